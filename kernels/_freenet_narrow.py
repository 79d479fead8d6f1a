"""A block whose weights fit on chip, in one pass over the tokens.

A program carries BM tokens through the block in its registers: projection, first norm, both linears of the MLP, second
norm. Device memory sees the features and the state once and the result once. The weights come from the second-level
cache, whole or BC columns at a time. The backward kernel goes through the block again, and through it backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block
from speedk.kernels._tiles import add_sum, as_operand, gelu, gelu_slope, load_row, load_tile, multiply, store_tile
from speedk.kernels.add_layer_norm import norm_backward, row_statistics


@triton.jit
def project(features_ptr, weight_ptr, bias_ptr, ld, row, in_row, col, in_col, BK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """features . weight^T + bias, [BM, BD], over all D columns at once or BK at a time."""
    if col.shape[0] == BK:
        x = load_tile(features_ptr, ld, row, in_row, col, in_col)
        weight = load_tile(weight_ptr, ld, col, in_col, col, in_col)
        x = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
    else:
        x = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
        x = multiply(features_ptr, ld, 1, row, in_row, weight_ptr, ld, 1, col, in_col, ld, BK, x, PRECISION)
    return x + load_row(bias_ptr, col, in_col)


@triton.jit
def into_mlp(hidden, weight_ptr, bias_ptr, ld, c, col, in_col, PRECISION: tl.constexpr):
    """The input of GELU [BM, BC] at the hidden columns c."""
    weight = load_tile(weight_ptr, ld, c, c < ld, col, in_col)  # [BC, BD]
    return tl.dot(hidden, tl.trans(weight), input_precision=PRECISION) + load_row(bias_ptr, c, c < ld)


@triton.jit
def out_of_mlp(active, weight_ptr, ld, c, col, in_col, y, PRECISION: tl.constexpr):
    """y [BM, BD] and what the hidden columns c, [BM, BC], add to it."""
    weight = load_tile(weight_ptr, ld, col, in_col, c, c < ld)  # [BD, BC]
    return tl.dot(active, tl.trans(weight), y, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "D"])
def _freenet_block_fwd_kernel(
    features_ptr, state_ptr, proj_weight_ptr, proj_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, out_ptr,
    M, D, ld, eps,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HAS_STATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BM
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_row, in_col = row < M - first, col < ld
    counts = (col < D)[None, :]
    features_ptr += first * ld
    dtype = out_ptr.dtype.element_ty
    if HAS_STATE:  # asked for before it is needed
        state = load_tile(state_ptr + first * ld, ld, row, in_row, col, in_col)

    x = project(features_ptr, proj_weight_ptr, proj_bias_ptr, ld, row, in_row, col, in_col, BK, PRECISION)
    if HAS_STATE and SUM:
        x += state.to(tl.float32)
    centred, rstd = row_statistics(x, counts, D, eps)
    x = centred * rstd[:, None] * load_row(norm1_weight_ptr, col, in_col) + load_row(norm1_bias_ptr, col, in_col)
    if HAS_STATE and not SUM:
        x += state.to(tl.float32)
    hidden = x.to(dtype)

    y = tl.zeros((BM, BD), tl.float32)
    if BC == BD:
        inner = into_mlp(hidden, fc1_weight_ptr, fc1_bias_ptr, ld, col, col, in_col, PRECISION)
        y = out_of_mlp(gelu(inner).to(dtype), fc2_weight_ptr, ld, col, col, in_col, y, PRECISION)
    else:
        for start in range(0, ld, BC):
            c = start + tl.arange(0, BC)
            inner = into_mlp(hidden, fc1_weight_ptr, fc1_bias_ptr, ld, c, col, in_col, PRECISION)
            y = out_of_mlp(gelu(inner).to(dtype), fc2_weight_ptr, ld, c, col, in_col, y, PRECISION)
    y += load_row(fc2_bias_ptr, col, in_col) + hidden.to(tl.float32)
    centred, rstd = row_statistics(y, counts, D, eps)
    y = centred * rstd[:, None] * load_row(norm2_weight_ptr, col, in_col) + load_row(norm2_bias_ptr, col, in_col)
    store_tile(out_ptr + first * ld, ld, row, in_row, col, in_col, y.to(dtype))


@triton.jit
def add_product(total_ptr, ld, col, in_col, d_product, operand, there, PRECISION: tl.constexpr):
    """Write d_product^T operand [ld, ld], in the rows before `there` added to what is there."""
    total = load_tile(total_ptr, ld, col, col < there, col, in_col)
    total = tl.dot(tl.trans(d_product), operand, total, input_precision=PRECISION)
    store_tile(total_ptr, ld, col, in_col, col, in_col, total)


@triton.jit(do_not_specialize=["M", "D", "more"])
def _freenet_block_bwd_kernel(
    d_out_ptr, features_ptr, state_ptr, proj_weight_ptr, proj_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, norm2_weight_ptr,
    d_features_ptr, d_state_ptr, d_branch_ptr, d_inner_ptr, d_mlp_ptr, hidden_ptr, active_ptr, sums_ptr,
    M, D, ld, eps, more,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, FUSED: tl.constexpr,
    HAS_STATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes d_features and d_state, and sums over its rows, [programs, 7 ld], or adds them to what is there if there
    is `more`: the gradients of the vectors, in the order of `VECTORS`. FUSED: then those of the matrices, [programs,
    7 ld + 3 ld ld]; else it writes what these are products of: d_branch, d_inner, d_mlp, hidden, active.

    Where the MLP is walked BC columns at a time, d_branch holds the normalised projection and d_inner the input of GELU
    until their own values come. What stands beyond D in a result has no meaning; as operand of a product it meets
    weights of zero.
    """
    ONE: tl.constexpr = BC == BD
    program = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    in_col = col < ld
    counts = (col < D)[None, :]
    dtype = d_features_ptr.dtype.element_ty
    sums_ptr += program * (7 * ld + (3 * ld * ld if FUSED else 0))
    matrices_ptr = sums_ptr + 7 * ld
    first = program * BM
    in_row = row < M - first
    base = first * ld
    there = ld * more
    if HAS_STATE:  # asked for before it is needed
        state = load_tile(state_ptr + base, ld, row, in_row, col, in_col)
    x = project(features_ptr + base, proj_weight_ptr, proj_bias_ptr, ld, row, in_row, col, in_col, BK, PRECISION)
    if HAS_STATE and SUM:
        x += state.to(tl.float32)
    centred, rstd1 = row_statistics(x, counts, D, eps)
    x = centred * rstd1[:, None]
    normalised = x.to(dtype)
    x = x * load_row(norm1_weight_ptr, col, in_col) + load_row(norm1_bias_ptr, col, in_col)
    if HAS_STATE and not SUM:
        x += state.to(tl.float32)
    hidden = x.to(dtype)
    if not FUSED:
        store_tile(hidden_ptr + base, ld, row, in_row, col, in_col, hidden)

    y = tl.zeros((BM, BD), tl.float32)
    if ONE:
        inner = into_mlp(hidden, fc1_weight_ptr, fc1_bias_ptr, ld, col, col, in_col, PRECISION)
        active = gelu(inner).to(dtype)
        inner = inner.to(dtype)
        if not FUSED:
            store_tile(active_ptr + base, ld, row, in_row, col, in_col, active)
        y = out_of_mlp(active, fc2_weight_ptr, ld, col, col, in_col, y, PRECISION)
    else:
        store_tile(d_branch_ptr + base, ld, row, in_row, col, in_col, normalised)
        for start in range(0, ld, BC):
            c = start + tl.arange(0, BC)
            inner = into_mlp(hidden, fc1_weight_ptr, fc1_bias_ptr, ld, c, col, in_col, PRECISION)
            active = gelu(inner).to(dtype)
            store_tile(d_inner_ptr + base, ld, row, in_row, c, c < ld, inner.to(dtype))
            store_tile(active_ptr + base, ld, row, in_row, c, c < ld, active)
            y = out_of_mlp(active, fc2_weight_ptr, ld, c, col, in_col, y, PRECISION)
    y += load_row(fc2_bias_ptr, col, in_col) + hidden.to(tl.float32)
    centred, rstd2 = row_statistics(y, counts, D, eps)
    y = centred * rstd2[:, None]
    d_out = load_tile(d_out_ptr + base, ld, row, in_row, col, in_col).to(tl.float32)
    add_sum(sums_ptr + 5 * ld, col, in_col, d_out * y, there)
    add_sum(sums_ptr + 6 * ld, col, in_col, d_out, there)
    weight = tl.load(norm2_weight_ptr + col, in_col, 0.0).to(tl.float32)
    y = norm_backward(d_out, y, weight, rstd2, D)
    add_sum(sums_ptr + 4 * ld, col, in_col, y, there)
    d_mlp = as_operand(y, counts, dtype)
    if not FUSED:
        store_tile(d_mlp_ptr + base, ld, row, in_row, col, in_col, d_mlp)

    if ONE:
        fc2 = load_tile(fc2_weight_ptr, ld, col, in_col, col, in_col)
        d_active = tl.dot(d_mlp, fc2, input_precision=PRECISION)
        d_active *= gelu_slope(inner.to(tl.float32))
        add_sum(sums_ptr + 3 * ld, col, in_col, d_active, there)
        d_inner = d_active.to(dtype)
        if FUSED:
            add_product(matrices_ptr + ld * ld, ld, col, in_col, d_inner, hidden, there, PRECISION)
            add_product(matrices_ptr + 2 * ld * ld, ld, col, in_col, d_mlp, active, there, PRECISION)
        else:
            store_tile(d_inner_ptr + base, ld, row, in_row, col, in_col, d_inner)
        fc1 = load_tile(fc1_weight_ptr, ld, col, in_col, col, in_col)
        d_hidden = tl.dot(d_inner, fc1, input_precision=PRECISION)
    else:
        tl.debug_barrier()  # other threads wrote what is read next
        d_hidden = tl.zeros((BM, BD), tl.float32)
        for start in range(0, ld, BC):
            c = start + tl.arange(0, BC)
            fc2 = load_tile(fc2_weight_ptr, ld, col, in_col, c, c < ld)  # [BD, BC]
            d_active = tl.dot(d_mlp, fc2, input_precision=PRECISION)
            d_active *= gelu_slope(load_tile(d_inner_ptr + base, ld, row, in_row, c, c < ld).to(tl.float32))
            add_sum(sums_ptr + 3 * ld, c, c < ld, d_active, there)
            d_inner = d_active.to(dtype)
            store_tile(d_inner_ptr + base, ld, row, in_row, c, c < ld, d_inner)
            fc1 = load_tile(fc1_weight_ptr, ld, c, c < ld, col, in_col)  # [BC, BD]
            d_hidden = tl.dot(d_inner, fc1, d_hidden, input_precision=PRECISION)
        normalised = load_tile(d_branch_ptr + base, ld, row, in_row, col, in_col)
    d_hidden += d_mlp.to(tl.float32)
    x = normalised.to(tl.float32)
    add_sum(sums_ptr + 1 * ld, col, in_col, d_hidden * x, there)
    add_sum(sums_ptr + 2 * ld, col, in_col, d_hidden, there)
    if HAS_STATE and not SUM:
        store_tile(d_state_ptr + base, ld, row, in_row, col, in_col, d_hidden.to(dtype))
    weight = tl.load(norm1_weight_ptr + col, in_col, 0.0).to(tl.float32)
    x = norm_backward(d_hidden, x, weight, rstd1, D)
    add_sum(sums_ptr, col, in_col, x, there)
    d_branch = as_operand(x, counts, dtype)
    if HAS_STATE and SUM:
        store_tile(d_state_ptr + base, ld, row, in_row, col, in_col, d_branch)
    if FUSED:
        features = load_tile(features_ptr + base, ld, row, in_row, col, in_col)
        add_product(matrices_ptr, ld, col, in_col, d_branch, features, there, PRECISION)
    else:
        if not ONE:
            tl.debug_barrier()  # every thread has read what d_branch held before
        store_tile(d_branch_ptr + base, ld, row, in_row, col, in_col, d_branch)
    if ONE:
        proj = load_tile(proj_weight_ptr, ld, col, in_col, col, in_col)
        d_x = tl.dot(d_branch, proj, input_precision=PRECISION)
        store_tile(d_features_ptr + base, ld, row, in_row, col, in_col, d_x.to(dtype))
    else:
        for start in range(0, ld, BC):
            c = start + tl.arange(0, BC)
            proj = load_tile(proj_weight_ptr, ld, col, in_col, c, c < ld)  # [BD, BC]
            d_x = tl.dot(d_branch, proj, input_precision=PRECISION)
            store_tile(d_features_ptr + base, ld, row, in_row, c, c < ld, d_x.to(dtype))


FORWARD = {2: (64, 32, 32, 4, 3), 4: (128, 32, 32, 8, 2)}
BACKWARD = {2: (64, 32, 32, 4, 2), 4: (32, 32, 32, 4, 2)}
"""BM, BK, BC, warps and stages for 64 < D <= 128, by the bytes of a value: what was fastest on an H200."""


def freenet_block_fwd_meta(D: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks for width D: BM tokens, BK columns of the projection's operands, BC hidden columns of the MLP at a time.
    BC = BD: all at once."""
    BD = block(D)
    full = itemsize == 4 and precision == "tf32x3"  # operands come through registers, in two halves
    if BD < 128:
        return {"BM": 64, "BD": BD, "BK": BD, "BC": BD, "num_warps": 8 if full and BD == 64 else 4, "num_stages": 1}
    BM, BK, BC, warps, stages = (32, 32, 32, 4, 2) if full else FORWARD[itemsize]
    return {"BM": BM, "BD": BD, "BK": BK, "BC": BC, "num_warps": warps, "num_stages": stages}


def freenet_block_bwd_meta(D: int, precision: str, itemsize: int) -> dict[str, int]:
    """The same for the backward kernel, which holds more at a time."""
    BD = block(D)
    if BD < 128:
        full = itemsize == 4 and precision == "tf32x3"
        return {"BM": 32 if full or BD == 64 else 64, "BD": BD, "BK": BD, "BC": BD, "FUSED": BD <= 32,
                "num_warps": 8 if full and BD == 64 else 4, "num_stages": 1}  # fmt: skip
    BM, BK, BC, warps, stages = BACKWARD[itemsize]
    return {"BM": BM, "BD": BD, "BK": BK, "BC": BC, "FUSED": False, "num_warps": warps, "num_stages": stages}


def forward(features: Tensor, state: Tensor | None, weights: list[Tensor], out: Tensor, D: int, norm: str, eps: float,
            precision: str) -> None:
    """features and state [M, ld] -> out [M, ld]."""
    M, ld = features.shape
    meta = freenet_block_fwd_meta(D, precision, features.element_size())
    _freenet_block_fwd_kernel[(triton.cdiv(M, meta["BM"]),)](
        features, features if state is None else state, *weights, out, M, D, ld, eps,
        HAS_STATE=state is not None, SUM=norm == "sum", PRECISION=precision, **meta,
    )  # fmt: skip


def backward_chunk(d_out: Tensor, features: Tensor, state: Tensor | None, weights: list[Tensor], d_features: Tensor,
                   d_state: Tensor | None, factors: Tensor | None, sums: Tensor, D: int, norm: str, eps: float,
                   more: bool, precision: str) -> None:
    """One chunk of rows: d_features, d_state, sums [programs, 7 ld (+ 3 ld ld where FUSED)] (added to, if there is
    `more`), and, unless FUSED, in `factors` [5, M, ld] d_branch, d_inner, d_mlp, hidden, active."""
    M, ld = features.shape
    meta = freenet_block_bwd_meta(D, precision, features.element_size())
    _freenet_block_bwd_kernel[(triton.cdiv(M, meta["BM"]),)](
        d_out, features, features if state is None else state, *weights[:9], d_features,
        d_features if state is None else d_state, *([d_features] * 5 if factors is None else factors), sums,
        M, D, ld, eps, int(more), HAS_STATE=state is not None, SUM=norm == "sum", PRECISION=precision, **meta,
    )  # fmt: skip
