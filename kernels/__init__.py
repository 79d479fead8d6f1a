"""Triton kernels and their launchers: pure functions of tensors, one module per op, installed as `speedk.kernels`.

A launcher takes tensors of any strides, allocates its results and fills every element. It knows nothing of autograd,
of dispatch or of a user's mistakes: `speedk.ops` checks shapes, dtypes and devices before it calls. Meta-parameters
(block sizes, warps, stages) are chosen from the shape by a plain `<op>_meta` function, never by timing, so that equal
inputs give equal bits on equal devices and `tests/test_compile_offline.py` can compile every choice.
"""
