"""Feature sparsification with global semantic preservation (paper, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(scm: Tensor, k: int) -> Tensor:
    """True for exactly the k entries of largest magnitude of each (image, head).

    Ties go to the lowest index j K + k. k = 0 keeps nothing.

    scm: [N, H, J, K] floating, any strides. Returns bool [N, H, J, K].
    Raises ValueError for k outside [0, J K] or where scm holds a NaN.
    """
    if scm.ndim != 4:
        raise ValueError(f"scm must be [N, H, J, K], got {tuple(scm.shape)}")
    size = scm.shape[2] * scm.shape[3]
    if not 0 <= k <= size:
        raise ValueError(f"k={k} is outside 0 to J K={size}")
    if torch.isnan(scm).any():
        raise ValueError("scm holds a NaN: its largest entries are not defined")
    return topk_mask_reference(scm, k)


def topk_mask_reference(scm: Tensor, k: int) -> Tensor:
    n, h, j, tokens = scm.shape
    order = scm.detach().abs().reshape(n, h, j * tokens).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter(-1, order[..., :k], True).reshape(n, h, j, tokens)


def sparsify(scm: Tensor, k: int) -> Tensor:
    """scm with all but its k largest entries per (image, head) set to zero: the bar-A of Eq. 6.

    Differentiable: the gradient passes through the entries that survive. Arguments and errors as for `topk_mask`.
    """
    return torch.where(topk_mask(scm, k), scm, 0)
