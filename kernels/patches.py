"""Fold and unfold: images [N, C, H, W] <-> tokens [N, J, L] of one patch each, L = (row r, column c, channel).

Neighbouring columns of a patch, 16 bytes of each channel, are as many bytes on end in the tokens. A thread reads such
units, C accesses of 16 bytes each, and puts their values in order in its registers. It writes an image's lines itself;
to tokens the values go through shared memory, so that neighbouring threads write on end. Units are taken in the tokens'
order.

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
from speedk.kernels._sums import sum_rows
from speedk.kernels._tiles import image_and_token, load_row, multiply


@triton.jit
def _columns(tiles, LOG: tl.constexpr):
    """The columns [B, 1] of tiles [B, 2^LOG]: all first ones, then all second ones, and so on."""
    for _ in tl.static_range(LOG):
        left, right = (), ()
        for i in tl.static_range(len(tiles)):
            even, odd = tl.split(tl.reshape(tiles[i], (tiles[i].shape[0], tiles[i].shape[1] // 2, 2)))
            left += (even,)
            right += (odd,)
        tiles = left + right
    return tiles


@triton.jit
def _tiles(columns, LOG: tl.constexpr):
    """The inverse of `_columns`."""
    for _ in tl.static_range(LOG):
        tiles = ()
        for i in tl.static_range(len(columns) // 2):
            both = tl.join(columns[i], columns[i + len(columns) // 2])
            tiles += (tl.reshape(both, (both.shape[0], both.shape[1] * 2)),)
        columns = tiles
    return columns


@triton.jit(do_not_specialize=["chunks", "units", "side"])
def _patches_kernel(
    image_ptr, tokens_ptr, chunks, units, side, image_n, image_c, image_h, image_w, tokens_n, tokens_j, tokens_l,
    C: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr, PAD: tl.constexpr, B: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """FOLD: tokens -> image; else image -> tokens. A unit is V = 2^LOG neighbouring columns of a patch: V values of
    each channel in the image, C V in the tokens. `units`: of an image; `side`: patches in a row. C is at most 2^PAD."""
    V: tl.constexpr = 1 << LOG
    Q: tl.constexpr = P // V
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64)
    u = (program % chunks).to(tl.int64 if WIDE else tl.int32) * B + tl.arange(0, B)
    keep = (u < units)[:, None]
    j, at = u // (P * Q), u % (P * Q)
    y, x = j // side * P + at // Q, j % side * Q + at % Q
    v = tl.arange(0, V)[None, :].to(tl.int64)
    # multiples of V, as the launcher sees to: what is V wide is moved at once
    image_at = tl.multiple_of(n * image_n + y.to(tl.int64) * image_h + x.to(tl.int64) * (V * image_w), V)
    tokens_at = tl.multiple_of(n * tokens_n + j.to(tl.int64) * tokens_j + at.to(tl.int64) * (C * V * tokens_l), V)
    image_ptrs = image_ptr + image_at[:, None] + v * image_w
    tokens_ptrs = tokens_ptr + tokens_at[:, None] + v * tokens_l
    if LOG > 0:
        image_c = tl.multiple_of(image_c, V)
    source, target = (tokens_ptrs, image_ptrs) if FOLD else (image_ptrs, tokens_ptrs)
    step, stride = (V * tokens_l, image_c) if FOLD else (image_c, V * tokens_l)
    if LOG == 0:
        for ch in range(C):
            tl.store(target + ch * stride, tl.load(source + ch * step, keep), keep)
    else:  # C tiles [B, V], whose values a thread exchanges among its own: value v C + ch of a unit is column v of ch
        tiles, moved = (), ()
        for i in tl.static_range(C):
            tiles += (tl.load(source + i * step, keep),)
        columns = _columns(tiles, LOG)
        if FOLD:
            for i in tl.static_range(C * V):
                moved += (columns[i % V * C + i // V],)
            tiles = _tiles(moved, LOG)
            for i in tl.static_range(C):
                tl.store(target + i * stride, tiles[i], keep)
        else:  # one tile, of which the compiler lets neighbouring threads store what is on end
            for i in tl.static_range(V << PAD):
                moved += (columns[i % (C * V)],)
            f = tl.arange(0, V << PAD)[None, :]
            tl.store(tokens_ptr + tokens_at[:, None] + f, _tiles(moved, LOG + PAD)[0], keep & (f < C * V))


def patches_meta(images: Tensor, tokens: Tensor, patch: int) -> dict[str, int]:
    """Units as wide as 16 bytes, the patch and the strides allow, and B of them, two to a thread; one where it has
    more than 4 channels, which take as many registers."""
    C, H, W = images.shape[1:]
    apart = (*images.stride()[:3], *tokens.stride()[:2], patch)
    log, pad = 0, (C - 1).bit_length()
    if images.stride(3) == tokens.stride(2) == 1 and not (images.data_ptr() | tokens.data_ptr()) % 16:
        while images.element_size() << log < 16 and 1 << pad + log < 32 and not any(s % (2 << log) for s in apart):
            log += 1
    B = block(H * W >> log, 32, 256)
    return {"LOG": log, "PAD": pad, "B": B, "num_warps": max(1, B // (64 if pad < 3 else 32))}


def _move(images: Tensor, tokens: Tensor, patch: int, fold: bool) -> None:
    N, C, H, W = images.shape
    if images.numel() == 0:
        return
    meta = patches_meta(images, tokens, patch)
    units = H * W >> meta["LOG"]
    chunks = triton.cdiv(units, meta["B"])
    with on_device_of(images):
        _patches_kernel[(N * chunks,)](
            images, tokens, chunks, units, W // patch, *images.stride(), *tokens.stride(),
            C=C, P=patch, FOLD=fold, WIDE=units + meta["B"] >= 2**31, **meta,
        )  # fmt: skip


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
def patch_offsets(first, J, side, image_n, image_h, image_w, P: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr):
    """Where the patch of each token n J + j from `first` on begins in the image."""
    n, j = image_and_token(first, J, BM, WHOLE)
    return n * image_n + (j // side * P).to(tl.int64) * image_h + (j % side * P).to(tl.int64) * image_w


@triton.jit(do_not_specialize=["count"])
def _tokens_to_images_fwd_kernel(
    state_ptr, weight_ptr, bias_ptr, image_ptr, count, J, side, C, D, state_row, state_col, weight_l, weight_d,
    P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first_token = tl.program_id(0).to(tl.int64) * BM
    token = first_token + tl.arange(0, BM)
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
    corner = patch_offsets(first_token, J, side, C * area, width, 1, P, BM, WHOLE)
    image_ptrs = image_ptr + lines[:, None, None] + corner[None, :, None] + c[None, None, :]
    keep = (line < C * P)[:, None, None] & (token < count)[None, :, None] & (c < P)[None, None, :]
    tl.store(image_ptrs, tile.to(image_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["count"])
def _tokens_to_images_state_bwd_kernel(
    d_image_ptr, weight_ptr, d_state_ptr, count, J, side, C, D, image_n, image_c, image_h, image_w, weight_l, weight_d,
    P: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_state = (the patches of d_image) . weight."""
    first_token = tl.program_id(0).to(tl.int64) * BM
    token = first_token + tl.arange(0, BM)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    patch_ptrs = d_image_ptr + patch_offsets(first_token, J, side, image_n, image_h, image_w, P, BM, WHOLE)
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
    d_image_ptr, state_ptr, partial_ptr, count, J, side, C, D, tiles,
    image_n, image_c, image_h, image_w, state_row, state_col,
    P: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, LT: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks `tiles` blocks of tokens and writes partial sums [split, L D + L], of d_weight and of d_bias."""
    split = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * LT
    d = (tl.program_id(2) * BD + tl.arange(0, BD)).to(tl.int64)
    output, exists = line_outputs(first, C, P, LT, BP)
    offsets = line_offsets(first, image_c, image_h, image_w, P, LT, BP)
    d_weight = tl.zeros((LT * BP, BD), tl.float32)
    d_bias = tl.zeros((LT * BP,), tl.float32)
    for tile in range(tiles):
        first_token = (split * tiles + tile) * BM
        token = first_token + tl.arange(0, BM)
        patch_ptrs = d_image_ptr + patch_offsets(first_token, J, side, image_n, image_h, image_w, P, BM, WHOLE)
        d_patch = tl.load(patch_ptrs[:, None] + offsets[None, :], (token < count)[:, None] & exists[None, :], 0.0)
        state_ptrs = state_ptr + token[:, None] * state_row + d[None, :] * state_col
        state = tl.load(state_ptrs, (token < count)[:, None] & (d < D)[None, :], 0.0)  # [BM, BD]
        d_weight = tl.dot(tl.trans(d_patch), state, d_weight, input_precision=PRECISION)
        d_bias += tl.sum(d_patch.to(tl.float32), 0)
    partial_ptr += split * C * P * P * (D + 1)
    tl.store(partial_ptr + output[:, None] * D + d[None, :], d_weight, exists[:, None] & (d < D)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial_ptr + C * P * P * D + output, d_bias, exists)


SPLIT_PROGRAMS = 1024
"""Programs that share the tokens in the gradient of the weight, or fewer, so that their sums take no more memory than
the tokens; the same on each device, so that the sums have one order everywhere."""


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


def tokens_to_images_bwd_meta(C: int, patch: int, D: int, precision: str, itemsize: int,
                              of_weight: bool) -> dict[str, int]:
    """Blocks of either backward kernel. In tf32 small ones: of the tensor cores' two instructions the one for larger
    blocks wants operands the other way round than they lie."""
    lines = lines_meta(C, patch)
    full = itemsize == 4 and precision == "tf32x3"
    if patch > 64 or full:  # the addresses of long lines, or operands in two halves, take registers
        warps = 4 if of_weight and patch <= 64 else 8
        return {**lines, "BM": 32, "BD": block(D, 16, 64), "num_warps": warps, "num_stages": 1 if full else 2}
    half = {"LT": max(lines["LT"] // 2, triton.cdiv(16, lines["BP"])), "BP": lines["BP"]}
    if itemsize == 4:
        return {**half, "BM": 32, "BD": block(D, 16, 128), "num_warps": 4, "num_stages": 2}
    BD = block(D, 16, 128 if of_weight and D <= 128 else 64)
    return {**(lines if of_weight else half), "BM": 64, "BD": BD, "num_warps": 4,
            "num_stages": 3 if of_weight else 2}  # fmt: skip


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
            P=patch, WHOLE=J % meta["BM"] == 0, PRECISION=dot_precision(state.dtype), **meta,
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
    if N * J * L * D == 0:
        return (state.new_zeros(N, J, D) if need_state else None,
                *((weight.new_zeros(L, D), weight.new_zeros(L)) if need_weight else (None, None)))  # fmt: skip
    d_state = state.new_empty(N, J, D) if need_state else None
    d_weight = d_bias = None
    side, precision = math.isqrt(J), dot_precision(state.dtype)
    with on_device_of(state):
        if need_state:
            meta = tokens_to_images_bwd_meta(C, patch, D, precision, state.element_size(), of_weight=False)
            grid = triton.cdiv(N * J, meta["BM"]), triton.cdiv(D, meta["BD"])
            _tokens_to_images_state_bwd_kernel[grid](
                d_images, weight, d_state, N * J, J, side, C, D, *d_images.stride(), *weight.stride(),
                P=patch, WHOLE=J % meta["BM"] == 0, PRECISION=precision, **meta,
            )  # fmt: skip
        if need_weight:
            state = state.reshape(-1, D)
            meta = tokens_to_images_bwd_meta(C, patch, D, precision, state.element_size(), of_weight=True)
            blocks, blocks_d, blocks_l = (triton.cdiv(N * J, meta["BM"]), triton.cdiv(D, meta["BD"]),
                                          triton.cdiv(C * patch, meta["LT"]))  # fmt: skip
            wanted = min(SPLIT_PROGRAMS // (blocks_d * blocks_l), state.nbytes // (4 * L * (D + 1)))
            tiles = triton.cdiv(blocks, max(1, wanted))
            splits = triton.cdiv(blocks, tiles)
            partial = torch.empty(splits, L * (D + 1), device=state.device, dtype=torch.float32)
            _tokens_to_images_weight_bwd_kernel[(splits, blocks_l, blocks_d)](
                d_images, state, partial, N * J, J, side, C, D, tiles, *d_images.stride(),
                *state.stride(), P=patch, WHOLE=J % meta["BM"] == 0, PRECISION=precision, **meta,
            )  # fmt: skip
            d_weight, d_bias = sum_rows(partial, weight.dtype, (L, D), (L,))
    return d_state, d_weight, d_bias
