"""A block whose weights do not fit on chip: a chunk of tokens at a time, few enough to stay in the second-level cache.

The products are the library's, which are at the roof for matrices of this size. All between two products is one kernel
over rows: a norm with what is added before and after it, GELU, and their backward passes with the sums over rows that
are the gradients of biases and norms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block
from speedk.kernels._tiles import add_sum, as_operand, gelu, gelu_slope, load_row, load_tile, store_tile
from speedk.kernels.add_layer_norm import norm_backward, row_statistics

PROGRAMS = 528
"""Programs that share the rows in the backward pass, each with a sum over its own: four for each multiprocessor of an
H100. Fixed, so that these sums are added in one order everywhere."""


@triton.jit(do_not_specialize=["M", "D"])
def _rows_norm_fwd_kernel(
    x_ptr, x_bias_ptr, before_ptr, after_ptr, weight_ptr, bias_ptr, out_ptr, M, D, ld, eps,
    BM: tl.constexpr, BD: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """out = norm(x + x_bias + before) + after, all [M, ld] but the vectors."""
    first = tl.program_id(0).to(tl.int64) * BM
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_row, in_col = row < M - first, col < ld
    base = first * ld
    x = load_tile(x_ptr + base, ld, row, in_row, col, in_col).to(tl.float32) + load_row(x_bias_ptr, col, in_col)
    if HAS_BEFORE:
        x += load_tile(before_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
    centred, rstd = row_statistics(x, (col < D)[None, :], D, eps)
    x = centred * rstd[:, None] * load_row(weight_ptr, col, in_col) + load_row(bias_ptr, col, in_col)
    if HAS_AFTER:
        x += load_tile(after_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
    store_tile(out_ptr + base, ld, row, in_row, col, in_col, x.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "D", "tiles", "there"])
def _rows_norm_bwd_kernel(
    d_out_ptr, more_ptr, x_ptr, x_bias_ptr, before_ptr, weight_ptr, d_x_ptr, total_ptr, sums_ptr,
    M, D, ld, eps, tiles, there,
    BM: tl.constexpr, BD: tl.constexpr, HAS_MORE: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """The gradient d_x of norm(x + x_bias + before) for d_out + more, which goes to `total`, too; and over the rows of
    `tiles` blocks, in the columns before `there` added to what is there, the sums [programs, 7 ld] of d_x, of the
    gradient of the norm's weight, and of its bias."""
    program = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_col, counts = col < ld, (col < D)[None, :]
    weight = tl.load(weight_ptr + col, in_col, 0.0).to(tl.float32)
    sum_x = tl.zeros((BM, BD), tl.float32)
    sum_weight, sum_bias = sum_x, sum_x
    for tile in range(tiles):
        first = (program * tiles + tile) * BM
        in_row = row < M - first
        base = first * ld
        x = load_tile(x_ptr + base, ld, row, in_row, col, in_col).to(tl.float32) + load_row(x_bias_ptr, col, in_col)
        d_out = load_tile(d_out_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
        if HAS_BEFORE:
            x += load_tile(before_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
        if HAS_MORE:
            d_out += load_tile(more_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
        if HAS_TOTAL:
            store_tile(total_ptr + base, ld, row, in_row, col, in_col, d_out.to(total_ptr.dtype.element_ty))
        centred, rstd = row_statistics(x, counts, D, eps)
        x = centred * rstd[:, None]
        sum_weight += d_out * x
        sum_bias += d_out
        x = norm_backward(d_out, x, weight, rstd, D)
        sum_x += x
        x = as_operand(x, counts, d_x_ptr.dtype.element_ty)
        store_tile(d_x_ptr + base, ld, row, in_row, col, in_col, x)
    sums_ptr += program * 7 * ld
    add_sum(sums_ptr, col, in_col, sum_x, there)
    add_sum(sums_ptr + ld, col, in_col, sum_weight, there)
    add_sum(sums_ptr + 2 * ld, col, in_col, sum_bias, there)


@triton.jit(do_not_specialize=["M"])
def _rows_gelu_fwd_kernel(x_ptr, bias_ptr, out_ptr, M, ld, BM: tl.constexpr, BD: tl.constexpr):
    """out = GELU(x + bias)."""
    first = tl.program_id(0).to(tl.int64) * BM
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_row, in_col = row < M - first, col < ld
    x = load_tile(x_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32) + load_row(bias_ptr, col, in_col)
    store_tile(out_ptr + first * ld, ld, row, in_row, col, in_col, gelu(x).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "tiles", "there"])
def _rows_gelu_bwd_kernel(d_out_ptr, x_ptr, bias_ptr, sums_ptr, M, ld, tiles, there,
                          BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The gradient of GELU(x + bias) takes the place of x; its sum over rows as above."""
    program = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_col = col < ld
    total = tl.zeros((BM, BD), tl.float32)
    for tile in range(tiles):
        first = (program * tiles + tile) * BM
        in_row = row < M - first
        x = load_tile(x_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32) + load_row(bias_ptr, col, in_col)
        x = load_tile(d_out_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32) * gelu_slope(x)
        total += x
        store_tile(x_ptr + first * ld, ld, row, in_row, col, in_col, x.to(x_ptr.dtype.element_ty))
    add_sum(sums_ptr + program * 7 * ld, col, in_col, total, there)


def rows_meta(D: int) -> dict[str, int]:
    """Blocks of the kernels over rows: 8 values a thread."""
    BD = block(D)
    return {"BM": max(1, 1024 // BD), "BD": BD, "num_warps": 4}


def _hidden(features: Tensor, state: Tensor | None, weights: list[Tensor], branch: Tensor, hidden: Tensor, D: int,
            norm: str, eps: float) -> None:
    """Fill `branch`, without its bias, and `hidden` [M, ld], what the MLP is given."""
    M, ld = features.shape
    meta = rows_meta(D)
    torch.mm(features, weights[0].T, out=branch)
    given = branch if state is None else state
    _rows_norm_fwd_kernel[(triton.cdiv(M, meta["BM"]),)](
        branch, weights[1], given, given, weights[2], weights[3], hidden, M, D, ld, eps,
        HAS_BEFORE=state is not None and norm == "sum", HAS_AFTER=state is not None and norm == "branch", **meta,
    )  # fmt: skip


def _mlp(hidden: Tensor, weights: list[Tensor], inner: Tensor, active: Tensor, mlp: Tensor, D: int) -> None:
    """Fill the input of GELU, what it gives, and the result of the MLP, the first and the last without their biases,
    all [M, ld]; the last may be the first."""
    M, ld = hidden.shape
    meta = rows_meta(D)
    torch.mm(hidden, weights[4].T, out=inner)
    _rows_gelu_fwd_kernel[(triton.cdiv(M, meta["BM"]),)](inner, weights[5], active, M, ld, **meta)
    torch.mm(active, weights[6].T, out=mlp)


def forward(features: Tensor, state: Tensor | None, weights: list[Tensor], out: Tensor, D: int, norm: str, eps: float,
            chunk: int) -> None:
    """features and state [M, ld] -> out [M, ld]; `chunk` rows at a time."""
    M, ld = features.shape
    buffers = features.new_empty(3, min(M, chunk), ld)
    meta = rows_meta(D)
    for start in range(0, M, chunk):
        rows = slice(start, start + chunk)
        x, y = features[rows], out[rows]
        hidden, inner, active = buffers[:, :len(x)].unbind()
        _hidden(x, None if state is None else state[rows], weights, inner, hidden, D, norm, eps)
        _mlp(hidden, weights, inner, active, inner, D)
        _rows_norm_fwd_kernel[(triton.cdiv(len(x), meta["BM"]),)](
            inner, weights[7], hidden, hidden, weights[8], weights[9], y, len(x), D, ld, eps,
            HAS_BEFORE=True, HAS_AFTER=False, **meta,
        )  # fmt: skip


def backward_chunk(d_out: Tensor, features: Tensor, state: Tensor | None, weights: list[Tensor], d_features: Tensor,
                   d_state: Tensor | None, buffers: Tensor, sums: Tensor, D: int, norm: str, eps: float,
                   more: bool) -> None:
    """One chunk of rows: d_features, d_state, sums [programs, 7 ld] (added to, if there is `more`), and in `buffers`
    [5, M, ld] d_branch, d_inner, d_mlp, hidden, active."""
    M, ld = features.shape
    meta = rows_meta(D)
    tiles = triton.cdiv(triton.cdiv(M, meta["BM"]), len(sums))
    grid, there, summed = (len(sums),), ld * more, norm == "sum"
    branch, inner, mlp, hidden, active = buffers.unbind()
    scratch = d_features  # until its own values come
    _hidden(features, state, weights, branch, hidden, D, norm, eps)
    _mlp(hidden, weights, inner, active, mlp, D)
    _rows_norm_bwd_kernel[grid](
        d_out, d_out, mlp, weights[7], hidden, weights[8], mlp, mlp, sums[0, 4 * ld:], M, D, ld, eps, tiles, there,
        HAS_MORE=False, HAS_BEFORE=True, HAS_TOTAL=False, **meta,
    )  # fmt: skip
    torch.mm(mlp, weights[6], out=scratch)
    _rows_gelu_bwd_kernel[grid](scratch, inner, weights[5], sums[0, 3 * ld:], M, ld, tiles, there, **meta)
    torch.mm(inner, weights[4], out=scratch)
    total = d_state if state is not None and not summed else branch
    _rows_norm_bwd_kernel[grid](
        scratch, mlp, branch, weights[1], branch if state is None else state, weights[2], branch, total, sums,
        M, D, ld, eps, tiles, there,
        HAS_MORE=True, HAS_BEFORE=state is not None and summed, HAS_TOTAL=total is d_state, **meta,
    )  # fmt: skip
    if state is not None and summed:
        d_state.copy_(branch)
    torch.mm(branch, weights[0], out=d_features)
