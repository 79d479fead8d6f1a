"""Fold and unfold: images [N, C, H, W] <-> tokens [N, J, L] of one patch each, L = (row r, column c, channel).

A program moves a block of tokens as a tile of four dimensions, so that both sides are read and written in order: the
tokens with the channel fastest, the image with the column fastest and neighbouring patches next to each other.

The final linear writes images straight from its accumulators. Its L outputs are taken in the order (channel, row,
column) by reading the rows of the weight in that order, so that what a program holds are whole lines of a patch, LT
"lines" (channel, row) of P columns, and the line of one patch continues in the next patch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, cut, dot_precision, on_device_of, padded, up_to
from speedk.kernels._tiles import load_row, multiply


@triton.jit(do_not_specialize=["count"])
def _patches_kernel(
    image_ptr, tokens_ptr, count, J, side, C,
    image_n, image_c, image_h, image_w, tokens_n, tokens_j, tokens_l,
    P: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """FOLD: tokens -> image; else image -> tokens. `side`: patches in a row; `count`: N J tokens."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = (tl.program_id(1) * BP + tl.arange(0, BP)).to(tl.int64)
    n, j = token // J, token % J
    c = tl.arange(0, BW).to(tl.int64)
    for first in range(0, C, BC):
        ch = first + tl.arange(0, BC)
        # tokens side: [BT, BP, BW, BC], channel fastest
        inner = (r[:, None, None] * P + c[None, :, None]) * C + ch[None, None, :]
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


@triton.jit
def line_outputs(lines, C, P: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr):
    """The outputs l = (r P + c) C + ch of LT lines from `lines` on, flat [LT BP], and whether they exist."""
    flat = tl.arange(0, LT * BP)
    line, c = lines + flat // BP, flat % BP
    return (((line % P) * P + c) * C + line // P).to(tl.int64), (line < C * P) & (c < P)


@triton.jit
def line_offsets(lines, image_c, image_h, image_w, P: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr):
    """Where those outputs lie within a patch of the image, flat [LT BP]."""
    flat = tl.arange(0, LT * BP)
    line, c = lines + flat // BP, flat % BP
    return (line // P).to(tl.int64) * image_c + (line % P).to(tl.int64) * image_h + c.to(tl.int64) * image_w


@triton.jit
def patch_offsets(token, J, side, image_n, image_h, image_w, P: tl.constexpr):
    """Where the patch of each token n J + j begins in the image."""
    n, j = token // J, token % J
    return n * image_n + (j // side * P) * image_h + (j % side * P) * image_w


@triton.jit(do_not_specialize=["count"])
def _tokens_to_images_fwd_kernel(
    state_ptr, weight_ptr, bias_ptr, image_ptr, count, J, side, C, D, state_row, state_col, weight_l, weight_d,
    P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * LT
    output, exists = line_outputs(first, C, P, LT, BP)
    acc = tl.zeros((BM, LT * BP), tl.float32)
    acc = multiply(state_ptr, state_row, state_col, token, token < count, weight_ptr, weight_l, weight_d, output,
                   exists, D, BK, acc, PRECISION)  # fmt: skip
    acc += load_row(bias_ptr, output, exists)
    tile = tl.permute(tl.reshape(acc, (BM, LT, BP)), (1, 0, 2))  # [LT, BM, BP]: a line of neighbouring patches
    line = first + tl.arange(0, LT)
    c = tl.arange(0, BP)
    width = side * P
    area = (width * width).to(tl.int64)
    lines = (line // P) * area + (line % P) * width
    corner = patch_offsets(token, J, side, C * area, width, 1, P)
    image_ptrs = image_ptr + lines[:, None, None] + corner[None, :, None] + c[None, None, :]
    keep = (line < C * P)[:, None, None] & (token < count)[None, :, None] & (c < P)[None, None, :]
    tl.store(image_ptrs, tile.to(image_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["count"])
def _tokens_to_images_state_bwd_kernel(
    d_image_ptr, weight_ptr, d_state_ptr, count, J, side, C, D, image_n, image_c, image_h, image_w, weight_l, weight_d,
    P: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_state = (the patches of d_image) . weight."""
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    patch_ptrs = d_image_ptr + patch_offsets(token, J, side, image_n, image_h, image_w, P)
    acc = tl.zeros((BM, BD), tl.float32)
    for first in range(0, C * P, LT):
        output, exists = line_outputs(first, C, P, LT, BP)
        offsets = line_offsets(first, image_c, image_h, image_w, P, LT, BP)
        d_patch = tl.load(patch_ptrs[:, None] + offsets[None, :], (token < count)[:, None] & exists[None, :], 0.0)
        weight_ptrs = weight_ptr + output[:, None] * weight_l + d[None, :] * weight_d
        weight = tl.load(weight_ptrs, exists[:, None] & (d < D)[None, :], 0.0)  # [LT BP, BD]
        acc = tl.dot(d_patch, weight, acc, input_precision=PRECISION)
    d_state_ptrs = d_state_ptr + token[:, None] * D + d[None, :]
    tl.store(d_state_ptrs, acc.to(d_state_ptr.dtype.element_ty), (token < count)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["count", "tiles"])
def _tokens_to_images_weight_bwd_kernel(
    d_image_ptr, state_ptr, d_weight_ptr, d_bias_ptr, count, J, side, C, D, tiles,
    image_n, image_c, image_h, image_w, state_row, state_col,
    P: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks `tiles` blocks of tokens and writes partial sums: d_weight [split, L, D], d_bias [split, L]."""
    split = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * LT
    d = (tl.program_id(2) * BD + tl.arange(0, BD)).to(tl.int64)
    output, exists = line_outputs(first, C, P, LT, BP)
    offsets = line_offsets(first, image_c, image_h, image_w, P, LT, BP)
    d_weight = tl.zeros((LT * BP, BD), tl.float32)
    d_bias = tl.zeros((LT * BP,), tl.float32)
    for tile in range(tiles):
        token = (split * tiles + tile) * BM + tl.arange(0, BM)
        patch_ptrs = d_image_ptr + patch_offsets(token, J, side, image_n, image_h, image_w, P)
        d_patch = tl.load(patch_ptrs[:, None] + offsets[None, :], (token < count)[:, None] & exists[None, :], 0.0)
        state_ptrs = state_ptr + token[:, None] * state_row + d[None, :] * state_col
        state = tl.load(state_ptrs, (token < count)[:, None] & (d < D)[None, :], 0.0)  # [BM, BD]
        d_weight = tl.dot(tl.trans(d_patch), state, d_weight, input_precision=PRECISION)
        d_bias += tl.sum(d_patch.to(tl.float32), 0)
    at = split * C * P * P + output
    tl.store(d_weight_ptr + at[:, None] * D + d[None, :], d_weight, exists[:, None] & (d < D)[None, :])
    if tl.program_id(2) == 0:
        tl.store(d_bias_ptr + at, d_bias, exists)


SPLIT_PROGRAMS = 1024
"""Programs that share the tokens in the gradient of the weight; fixed, so that the sums have one order everywhere."""


def lines_meta(C: int, patch: int) -> dict[str, int]:
    """LT lines of BP columns: 64 outputs, or fewer where there are fewer, and 16 at least."""
    BP = block(patch, 1)
    LT = min(max(1, 64 // BP), block(C * patch, 1))
    return {"LT": max(LT, triton.cdiv(16, BP)), "BP": BP}


def tokens_to_images_fwd_meta(C: int, patch: int, D: int) -> dict[str, int]:
    """Blocks of the forward kernel."""
    spread = patch > 64  # the addresses of long lines take registers
    return {**lines_meta(C, patch), "BM": 32 if spread else 64, "BK": block(D, 16, 32),
            "num_warps": 8 if spread else 4, "num_stages": 3}  # fmt: skip


def tokens_to_images_bwd_meta(C: int, patch: int, D: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks of both backward kernels."""
    registers = itemsize == 4 and precision == "ieee"  # no tensor cores: operands come through registers
    spread = registers or patch > 64
    return {**lines_meta(C, patch), "BM": 32 if spread else 64, "BD": block(D, 16, 64),
            "num_warps": 8 if spread else 4, "num_stages": 1 if registers else 2}  # fmt: skip


def tokens_to_images_fwd(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    """state [N, J, D], weight [L, D], any strides, bias [L], of one dtype -> images [N, C, H, W]; J a square number,
    patch at most 128."""
    N, J, D = state.shape
    side = math.isqrt(J)
    images = torch.empty(N, channels, side * patch, side * patch, device=state.device, dtype=state.dtype)
    if images.numel() == 0:
        return images
    state = state.reshape(-1, D)
    meta = tokens_to_images_fwd_meta(channels, patch, D)
    grid = (triton.cdiv(N * J, meta["BM"]), triton.cdiv(channels * patch, meta["LT"]))
    with on_device_of(state):
        _tokens_to_images_fwd_kernel[grid](
            state, weight, bias.contiguous(), images, N * J, J, side, channels, D, *state.stride(), *weight.stride(),
            P=patch, PRECISION=dot_precision(state.dtype), **meta,
        )  # fmt: skip
    return images


def tokens_to_images_bwd(
    d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool = True, need_weight: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `tokens_to_images_fwd` for d_images [N, C, H, W], any strides: (d_state, d_weight, d_bias), the
    last two together, None where not needed. Partial sums over a fixed split of the tokens, no atomics."""
    (N, J, D), (L, C) = state.shape, (len(weight), d_images.shape[1])
    if D % 16:  # see freenet.py: addresses that are not a multiple of 16 bytes take more registers than there are
        wide = up_to(D, 16)
        d_state, d_weight, d_bias = tokens_to_images_bwd(
            d_images, padded(state, N, J, wide), padded(weight, L, wide), patch, need_state, need_weight
        )
        return (d_state if d_state is None else cut(d_state, N, J, D),
                d_weight if d_weight is None else cut(d_weight, L, D), d_bias)  # fmt: skip
    d_state = torch.zeros(N, J, D, device=state.device, dtype=state.dtype) if need_state else None
    d_weight = torch.zeros(L, D, device=state.device, dtype=weight.dtype) if need_weight else None
    d_bias = torch.zeros(L, device=state.device, dtype=weight.dtype) if need_weight else None
    if N * J * L * D == 0:
        return d_state, d_weight, d_bias
    side, precision = math.isqrt(J), dot_precision(state.dtype)
    meta = tokens_to_images_bwd_meta(C, patch, D, precision, state.element_size())
    blocks, blocks_d, blocks_l = (triton.cdiv(N * J, meta["BM"]), triton.cdiv(D, meta["BD"]),
                                  triton.cdiv(C * patch, meta["LT"]))  # fmt: skip
    with on_device_of(state):
        if need_state:
            _tokens_to_images_state_bwd_kernel[(blocks, blocks_d)](
                d_images, weight, d_state, N * J, J, side, C, D, *d_images.stride(), *weight.stride(),
                P=patch, PRECISION=precision, **meta,
            )  # fmt: skip
        if need_weight:
            state = state.reshape(-1, D)
            tiles = triton.cdiv(blocks, max(1, SPLIT_PROGRAMS // (blocks_d * blocks_l)))
            splits = triton.cdiv(blocks, tiles)
            partial = torch.empty(splits, L, D, device=state.device, dtype=torch.float32)
            partial_bias = torch.empty(splits, L, device=state.device, dtype=torch.float32)
            _tokens_to_images_weight_bwd_kernel[(splits, blocks_l, blocks_d)](
                d_images, state, partial, partial_bias, N * J, J, side, C, D, tiles, *d_images.stride(),
                *state.stride(), P=patch, PRECISION=precision, **meta,
            )  # fmt: skip
            d_weight, d_bias = partial.sum(0).to(weight.dtype), partial_bias.sum(0).to(weight.dtype)
    return d_state, d_weight, d_bias
