"""The stored form of sparse coding matrices: coordinates and values (paper, Section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops.mhsc import mhsc
from speedk.ops.topk import topk_mask


def index_dtype(size: int) -> torch.dtype:
    """The dtype that stores an index below `size`: uint8 up to 256, uint16 up to 65,536."""
    if size > 65536:
        raise ValueError(f"an index below {size} does not fit 16 bits")
    return torch.uint8 if size <= 256 else torch.uint16


def coo_encode(scm: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each (image, head) as values and coordinates, in order of j K + k.

    scm: [N, H, J, K] floating. Returns values [N, H, k] of scm's dtype, rows [N, H, k] (patches, below J) and
    cols [N, H, k] (tokens, below K); both indices share one dtype, uint8 where J and K are at most 256, else uint16.
    Errors as for `topk_mask`.
    """
    n, h, j, tokens = scm.shape
    flat = topk_mask(scm, k).reshape(n, h, j * tokens).nonzero()[:, 2].reshape(n, h, k)
    values = scm.reshape(n, h, j * tokens).gather(-1, flat)
    dtype = index_dtype(max(j, tokens))
    return values, (flat // tokens).to(dtype), (flat % tokens).to(dtype)


def coo_decode(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int) -> Tensor:
    """The dense codes [N, H, J, K] of stored entries; zero elsewhere. Entries of one coordinate add up.

    values, rows, cols: [N, H, k]; rows below J, cols below K. Raises ValueError where an index is out of range.
    """
    rows, cols = rows.long(), cols.long()
    if rows.numel() and (int(rows.max()) >= J or int(cols.max()) >= K or int(rows.min()) < 0 or int(cols.min()) < 0):
        raise ValueError(f"an index is out of range: rows must be below J={J} and cols below K={K}")
    n, h, _ = values.shape
    return values.new_zeros(n, h, J * K).scatter_add(-1, rows * K + cols, values).reshape(n, h, J, K)


def mhsc_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int) -> Tensor:
    """`mhsc` from stored entries: mhsc(coo_decode(values, rows, cols, J, K), saet), [N, J, D]."""
    return mhsc(coo_decode(values, rows, cols, J, saet.shape[0]), saet)
