"""Multi-head sparse coding before its projection (paper, Eq. 3)."""

from __future__ import annotations

from torch import Tensor


def mhsc(scm: Tensor, saet: Tensor) -> Tensor:
    """Combine the epitomic tokens by the codes, head by head, and lay the heads side by side.

    Head h of the result is scm[:, h] @ saet[:, h D/H : (h+1) D/H]: the paper's [E^1 A^1, ..., E^H A^H] of Eq. 3,
    transposed (a token a row).

    scm: [N, H, J, K] floating, any strides; saet: [K, D] of the same dtype, D a multiple of H.
    Returns [N, J, D]. Raises ValueError where the shapes do not fit.
    """
    if scm.ndim != 4 or saet.ndim != 2:
        raise ValueError(f"scm must be [N, H, J, K] and saet [K, D], got {tuple(scm.shape)} and {tuple(saet.shape)}")
    if scm.shape[3] != saet.shape[0]:
        raise ValueError(f"saet has K={saet.shape[0]} tokens but scm has K={scm.shape[3]} columns")
    if saet.shape[1] % scm.shape[1]:
        raise ValueError(f"D={saet.shape[1]} is not a multiple of H={scm.shape[1]} heads")
    return mhsc_reference(scm, saet)


def mhsc_reference(scm: Tensor, saet: Tensor) -> Tensor:
    n, h, j, k = scm.shape
    pools = saet.reshape(k, h, -1).transpose(0, 1)  # [H, K, D/H]
    return (scm @ pools).transpose(1, 2).reshape(n, j, saet.shape[1])
