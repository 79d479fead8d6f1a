"""Fold and unfold: images <-> tokens of one patch each (paper, Section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into non-overlapping square patches, one token each.

    Tokens run row-major over the patch grid; the L = patch * patch * C values of a token are ordered
    (row, column, channel), channel fastest.

    images: [N, C, H, W] floating, any strides; H and W multiples of `patch`.
    Returns [N, J, L] with J = (H / patch) * (W / patch).
    Raises ValueError where `patch` does not divide the image.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {tuple(images.shape)}")
    return patchify_reference(images, _divides(images, patch))


def _divides(images: Tensor, patch: int) -> int:
    height, width = images.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide images of {height}x{width}")
    return patch


def patchify_reference(images: Tensor, patch: int) -> Tensor:
    n, c, h, w = images.shape
    grid = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, channels: int, patch: int) -> Tensor:
    """Put tokens back together into square images: the inverse of `patchify`.

    tokens: [N, J, L] floating, any strides; J a square number, L = patch * patch * channels.
    Returns [N, C, H, W] with H = W = patch * sqrt(J).
    Raises ValueError where J is not square or L does not fit.
    """
    if tokens.ndim != 3 or tokens.shape[2] != patch * patch * channels:
        raise ValueError(f"tokens must be [N, J, {patch * patch * channels}] for {channels} channels and "
                         f"patch={patch}, got {tuple(tokens.shape)}")
    side = int(tokens.shape[1] ** 0.5 + 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"J={tokens.shape[1]} patches do not make a square image")
    return unpatchify_reference(tokens, channels, patch)


def unpatchify_reference(tokens: Tensor, channels: int, patch: int) -> Tensor:
    n, j, _ = tokens.shape
    side = int(j**0.5 + 0.5)
    grid = tokens.reshape(n, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, side * patch, side * patch)


def tokens_to_images(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    """The last line of Eq. 4: project each token to its patch and put the patches together.

    state: [N, J, D]; weight: [L, D]; bias: [L]. Returns [N, C, H, W].
    """
    return unpatchify(torch.nn.functional.linear(state, weight, bias), channels, patch)
