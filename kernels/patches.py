"""Fold and unfold: images [N, C, H, W] <-> tokens [N, J, L] of one patch each, L = (row r, column c, channel).

A program moves a block of tokens as a tile of four dimensions, so that both sides are read and written in order: the
tokens with the channel fastest, the image with the column fastest and neighbouring patches next to each other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, on_device_of


@triton.jit(do_not_specialize=["count"])
def _patches_kernel(
    image_ptr, tokens_ptr, count, J, side, C,
    image_n, image_c, image_h, image_w, tokens_n, tokens_j, tokens_l,
    P: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """FOLD: tokens -> image; else image -> tokens. `side`: patches in a row; `count`: N J tokens."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BP + tl.arange(0, BP)
    n, j = token // J, token % J
    c = tl.arange(0, BW)
    for first in range(0, C, BC):
        ch = first + tl.arange(0, BC)
        # tokens side: [BT, BP, BW, BC], channel fastest
        inner = ((r[:, None, None] * P + c[None, :, None]) * C + ch[None, None, :]).to(tl.int64)
        tokens_ptrs = tokens_ptr + (n * tokens_n + j * tokens_j)[:, None, None, None] + inner[None] * tokens_l
        fits = (r < P)[:, None, None] & (c < P)[None, :, None] & (ch < C)[None, None, :]
        tokens_keep = (token < count)[:, None, None, None] & fits[None]
        # image side: [BC, BP, BT, BW], column fastest, then the patches of a row
        line = ch[:, None].to(tl.int64) * image_c + r[None, :] * image_h  # [BC, BP]
        corner = n * image_n + (j // side * P) * image_h + (j % side * P) * image_w
        image_ptrs = image_ptr + line[:, :, None, None] + corner[None, None, :, None] + (c * image_w)[None, None, None]
        line_fits = (ch < C)[:, None] & (r < P)[None, :]
        image_keep = line_fits[:, :, None, None] & (token < count)[None, None, :, None] & (c < P)[None, None, None]
        if FOLD:
            tile = tl.load(tokens_ptrs, tokens_keep)
            tl.store(image_ptrs, tl.permute(tile, (3, 1, 0, 2)), image_keep)
        else:
            tile = tl.load(image_ptrs, image_keep)
            tl.store(tokens_ptrs, tl.permute(tile, (2, 1, 3, 0)), tokens_keep)


def patches_meta(C: int, patch: int) -> dict[str, int]:
    """A tile of about 2,048 values: BT tokens of BP rows of a patch, BC channels."""
    BC = block(C, 1, 4)
    BW = block(patch, 1)
    BP = min(BW, max(1, 512 // (BW * BC)))
    return {"BT": max(1, 2048 // (BW * BC * BP)), "BP": BP, "BW": BW, "BC": BC, "num_warps": 4}


def _move(images: Tensor, tokens: Tensor, patch: int, fold: bool) -> None:
    N, C, _, W = images.shape
    J = tokens.shape[1]
    if images.numel() == 0:
        return
    meta = patches_meta(C, patch)
    grid = (triton.cdiv(N * J, meta["BT"]), triton.cdiv(patch, meta["BP"]))
    with on_device_of(images):
        _patches_kernel[grid](
            images, tokens, N * J, J, W // patch, C, *images.stride(), *tokens.stride(), P=patch, FOLD=fold, **meta
        )


def patchify_fwd(images: Tensor, patch: int) -> Tensor:
    """images [N, C, H, W], any strides and dtype -> tokens [N, J, L], contiguous; the gradient of `unpatchify_fwd`."""
    N, C, H, W = images.shape
    J = (H // patch) * (W // patch)
    tokens = torch.empty(N, J, patch * patch * C, device=images.device, dtype=images.dtype)
    _move(images, tokens, patch, fold=False)
    return tokens


def unpatchify_fwd(tokens: Tensor, channels: int, patch: int, width: int | None = None) -> Tensor:
    """tokens [N, J, L], any strides and dtype -> images [N, C, H, W], contiguous; the gradient of `patchify_fwd`.

    `width`: patches in a row of the image; without it the image is square.
    """
    N, J, _ = tokens.shape
    width = math.isqrt(J) if width is None else width
    height = J // width if width else 0
    images = torch.empty(N, channels, height * patch, width * patch, device=tokens.device, dtype=tokens.dtype)
    _move(images, tokens, patch, fold=True)
    return images
