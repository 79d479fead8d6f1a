"""Pieces of kernels that several ops share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a_ptr, a_row, a_col, row, in_row, w_ptr, w_out, w_in, out, in_out, D, BK: tl.constexpr, acc,
             PRECISION: tl.constexpr):  # fmt: skip
    """acc [BM, BN] + a[row, :] . w[out, :], over the D columns of a and w."""
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + row[:, None] * a_row
    w_ptrs = w_ptr + out[:, None] * w_out
    for start in range(0, D, BK):
        ks = (start + k).to(tl.int64)
        a = tl.load(a_ptrs + ks[None, :] * a_col, in_row[:, None] & (ks < D)[None, :], 0.0)  # [BM, BK]
        w = tl.load(w_ptrs + ks[None, :] * w_in, in_out[:, None] & (ks < D)[None, :], 0.0)  # [BN, BK]
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_row(ptr, col, in_col):
    """A vector of D values as [1, BD] float32, zero beyond D."""
    return tl.load(ptr + col, in_col, 0.0).to(tl.float32)[None, :]
