"""LayerNorm of x + residual over the last dimension, one pass over memory in each direction.

A program holds whole rows, so mean and variance are taken from registers (the variance from centred values, which
does not cancel). Nothing is stored for the backward pass: it reads x and the residual again, as it must read them
for the normalised values anyway, and both statistics come with them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, on_device_of
from speedk.kernels._sums import sum_rows

BACKWARD_PROGRAMS = 1024
"""Programs among which the backward kernel divides the rows, each with a partial sum of d_weight and d_bias. Fixed,
so that the order of the sums does not depend on the device."""

WIDEST_IN_REGISTERS = 8192
"""The widest row whose sums of d_weight and d_bias a program keeps in registers. Wider ones go to memory, a quarter as
many programs, so that their sums stay in the second-level cache."""


@triton.jit
def row_statistics(x, keep, D, eps):
    """Rows x [BR, BD] float32, zero where not keep -> centred rows [BR, BD] and 1 / standard deviation [BR]."""
    centred = tl.where(keep, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)


@triton.jit
def norm_backward(d_y, normalised, weight, rstd, D):
    """The gradient of rows before a LayerNorm, all [BR, BD] but weight [BD] and rstd [BR]; what it gives beyond D has
    no meaning.

    The mean is that of the very numbers it is taken from: of any others, like the products they are made of, what is
    left of a row that should vanish (D = 1) is a rounding, multiplied by a rstd of up to 1 / sqrt(eps).
    """
    scaled = d_y * weight[None, :]
    along = scaled - normalised * (tl.sum(scaled * normalised, 1) / D)[:, None]
    return (along - (tl.sum(along, 1) / D)[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, rows, D, eps,
    x_row, x_col, residual_row, residual_col, weight_col, bias_col,
    BR: tl.constexpr, BD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    col = tl.arange(0, BD).to(tl.int64)
    keep = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + col[None, :] * x_col, keep, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row[:, None] * residual_row + col[None, :] * residual_col, keep, 0.0).to(tl.float32)
    centred, rstd = row_statistics(x, keep, D, eps)
    weight = tl.load(weight_ptr + col * weight_col, col < D, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col * bias_col, col < D, 0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + row[:, None] * D + col[None, :], out.to(out_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _add_layer_norm_bwd_kernel(
    d_out_ptr, x_ptr, residual_ptr, weight_ptr, d_x_ptr, partial_ptr, rows, D, eps, tiles,
    d_out_row, d_out_col, x_row, x_col, residual_row, residual_col, weight_col,
    BR: tl.constexpr, BD: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SUMS_IN_MEMORY: tl.constexpr,
):  # fmt: skip
    """A program walks `tiles` blocks of rows; partial is [programs, 2, D], the sums of d_weight and d_bias. They are
    kept in registers, or with SUMS_IN_MEMORY where they belong."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BD).to(tl.int64)
    partial_ptrs = partial_ptr + program * 2 * D + col
    weight = tl.load(weight_ptr + col * weight_col, col < D, 0.0).to(tl.float32)
    d_weight = tl.zeros((BR, BD), tl.float32)  # summed over its rows at the end: once across the warps, not per block
    d_bias = tl.zeros((BR, BD), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * BR + tl.arange(0, BR)
        keep = (row < rows)[:, None] & (col < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + col[None, :] * x_col, keep, 0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + row[:, None] * residual_row + col[None, :] * residual_col
            x += tl.load(residual_ptrs, keep, 0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + row[:, None] * d_out_row + col[None, :] * d_out_col, keep, 0.0).to(tl.float32)
        centred, rstd = row_statistics(x, keep, D, eps)
        normalised = centred * rstd[:, None]
        if SUMS_IN_MEMORY:
            before = (col < D) & (tile > 0)
            tl.store(partial_ptrs, tl.load(partial_ptrs, before, 0.0) + tl.sum(d_out * normalised, 0), col < D)
            tl.store(partial_ptrs + D, tl.load(partial_ptrs + D, before, 0.0) + tl.sum(d_out, 0), col < D)
            tl.debug_barrier()  # another thread may read them next
            weight = tl.load(weight_ptr + col * weight_col, col < D, 0.0).to(tl.float32)
        else:
            d_weight += d_out * normalised
            d_bias += d_out
        d_x = norm_backward(d_out, normalised, weight, rstd, D)
        tl.store(d_x_ptr + row[:, None] * D + col[None, :], d_x.to(d_x_ptr.dtype.element_ty), keep)
    if not SUMS_IN_MEMORY:
        tl.store(partial_ptrs, tl.sum(d_weight, 0), col < D)
        tl.store(partial_ptrs + D, tl.sum(d_bias, 0), col < D)


def add_layer_norm_meta(D: int) -> dict[str, int]:
    """Rows of a block and warps for rows of D: about 16 values a thread, a warp to a row or more where it fits."""
    BD = block(D, smallest=1)
    BR = max(1, 2048 // BD)
    return {"BR": BR, "BD": BD, "num_warps": max(BR * BD // 512, 1)}


def add_layer_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], residual of its shape or None, weight and bias [D], any strides -> [..., D] of x's dtype, contiguous;
    D at most 16,384."""
    D = x.shape[-1]
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if out.numel() == 0:
        return out
    x = x.reshape(-1, D)
    residual = x if (plain := residual is None) else residual.reshape(-1, D)
    meta = add_layer_norm_meta(D)
    with on_device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(len(x), meta["BR"]),)](
            x, residual, weight, bias, out, len(x), D, eps,
            *x.stride(), *residual.stride(), *weight.stride(), *bias.stride(), HAS_RESIDUAL=not plain, **meta,
        )  # fmt: skip
    return out


def add_layer_norm_bwd(
    d_out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `add_layer_norm_fwd`: (d_x, which is d_residual too, d_weight, d_bias). No atomics."""
    D = x.shape[-1]
    d_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if d_x.numel() == 0:
        return d_x, weight.new_zeros(D), weight.new_zeros(D)
    x, d_out = x.reshape(-1, D), d_out.reshape(-1, D)
    residual = x if (plain := residual is None) else residual.reshape(-1, D)
    meta = add_layer_norm_meta(D)
    blocks = triton.cdiv(len(x), meta["BR"])
    wide = D > WIDEST_IN_REGISTERS
    tiles = triton.cdiv(blocks, BACKWARD_PROGRAMS // 4 if wide else BACKWARD_PROGRAMS)
    programs = triton.cdiv(blocks, tiles)
    partial = torch.empty(programs, 2, D, device=x.device, dtype=torch.float32)
    with on_device_of(x):
        _add_layer_norm_bwd_kernel[(programs,)](
            d_out, x, residual, weight, d_x, partial, len(x), D, eps, tiles,
            *d_out.stride(), *x.stride(), *residual.stride(), *weight.stride(),
            HAS_RESIDUAL=not plain, SUMS_IN_MEMORY=wide, **meta,
        )  # fmt: skip
    d_weight, d_bias = sum_rows(partial.view(programs, -1), weight.dtype, (D,), (D,))
    return d_x, d_weight, d_bias
