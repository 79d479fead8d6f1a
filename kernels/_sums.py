"""Partial results of many programs added up in an order that does not depend on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, on_device_of


@triton.jit(do_not_specialize=["rows", "size", "first"])
def _sum_rows_kernel(partial_ptr, out_ptr, rest_ptr, rows, size, first, BR: tl.constexpr, BS: tl.constexpr):
    """The first `first` of the sums go to `out`, the others to `rest`."""
    col = tl.program_id(0) * BS + tl.arange(0, BS)
    acc = tl.zeros((BR, BS), tl.float32)
    for start in range(0, rows, BR):
        row = (start + tl.arange(0, BR)).to(tl.int64)
        acc += tl.load(partial_ptr + row[:, None] * size + col[None, :], (row < rows)[:, None] & (col < size)[None, :],
                       0.0)  # fmt: skip
    total = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + col, total, col < first)
    tl.store(rest_ptr + (col - first), total, (col >= first) & (col < size))


def sum_rows_meta(rows: int) -> dict[str, int]:
    """Blocks: a line of 128 bytes wide, and as many rows as their loads can be on the way at once."""
    BR = block(rows, 1, 256)
    return {"BR": BR, "BS": 32, "num_warps": max(1, min(8, BR // 32)), "num_stages": 1}


def sum_rows(partial: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """partial [rows, size] float32, contiguous -> its sum over rows in `dtype`, as one or two tensors of these shapes,
    which lie in it end to end."""
    rows, size = partial.shape
    out = [torch.empty(shape, device=partial.device, dtype=dtype) for shape in shapes]
    meta = sum_rows_meta(rows)
    with on_device_of(partial):
        _sum_rows_kernel[(triton.cdiv(size, meta["BS"]),)](partial, out[0], out[-1], rows, size, out[0].numel(), **meta)
    return out
