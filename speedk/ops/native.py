"""Launchers of the C++/CUDA kernels: allocate, pass addresses, return. The ops have checked what comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops.dispatch import native

# The values of `Dtype` in csrc/isa.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def topk(scm: Tensor, k: int, *, dense: Tensor | None = None, mask: Tensor | None = None, values: Tensor | None = None,
         rows: Tensor | None = None, cols: Tensor | None = None) -> bool:
    """Fill whichever results are given, all contiguous, from scm [N, H, J, K]; returns whether scm holds a NaN."""
    scm = scm.contiguous()
    n, h, j, tokens = scm.shape
    index_bytes = 0 if rows is None else rows.element_size()
    return native().topk(
        DTYPES[scm.dtype], scm.data_ptr(), n * h, j, tokens, k, address(dense), address(mask), address(values),
        address(rows), address(cols), index_bytes, torch.get_num_threads(),
    )  # fmt: skip
