"""One block of FReeNet (Eq. 4) in one pass over the tokens.

A program carries BM tokens through the block: projection, first norm, both linears of the MLP, second norm. What does
not fit in registers, the BM hidden rows Z' as the operand of the next product, takes the place in `out` where the
result will go in the end: written and read back by the same program, it stays in the caches. So device memory sees
the features and the state once and the result once, whatever D is. The weights stream from the second-level cache a
block of columns at a time; docs/math/freenet.md has the arithmetic.

Rows are `ld` values apart, a multiple of 16. Where D is none, launchers work on copies with zeros behind the D values:
addresses that are not a multiple of 16 bytes take registers each of their own, more than there are.

Nothing but the arguments is kept for the backward pass. It goes through the block again, CHUNK tokens at a time, and
leaves in buffers of that many rows what the gradients of the weights are products of; those three products are plain
matrix products over the tokens, which the library does at the roof.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, cut, dot_precision, on_device_of, padded, up_to
from speedk.kernels._tiles import load_row, multiply
from speedk.kernels.add_layer_norm import norm_backward, row_statistics


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["M", "D"])
def _freenet_block_fwd_kernel(
    features_ptr, state_ptr, proj_weight_ptr, proj_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, out_ptr,
    M, D, ld, eps,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HAS_STATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    in_row, in_col = row < M, col < ld
    keep = in_row[:, None] & in_col[None, :]
    counts = (col < D)[None, :]
    out_ptrs = out_ptr + row[:, None] * ld + col[None, :]
    dtype = out_ptr.dtype.element_ty

    x = tl.zeros((BM, BD), tl.float32)
    x = multiply(features_ptr, ld, 1, row, in_row, proj_weight_ptr, ld, 1, col, in_col, ld, BK, x, PRECISION)
    x += load_row(proj_bias_ptr, col, in_col)
    if HAS_STATE and SUM:
        x += tl.load(state_ptr + row[:, None] * ld + col[None, :], keep, 0.0).to(tl.float32)
    centred, rstd = row_statistics(x, counts, D, eps)
    hidden = centred * rstd[:, None] * load_row(norm1_weight_ptr, col, in_col) + load_row(norm1_bias_ptr, col, in_col)
    if HAS_STATE and not SUM:
        hidden += tl.load(state_ptr + row[:, None] * ld + col[None, :], keep, 0.0).to(tl.float32)
    tl.store(out_ptrs, hidden.to(dtype), keep)
    tl.debug_barrier()  # the other threads read these rows next

    y = tl.zeros((BM, BD), tl.float32)
    for first in range(0, ld, BC):
        c = first + tl.arange(0, BC)
        inner = tl.zeros((BM, BC), tl.float32)
        inner = multiply(out_ptr, ld, 1, row, in_row, fc1_weight_ptr, ld, 1, c, c < ld, ld, BK, inner, PRECISION)
        active = gelu(inner + load_row(fc1_bias_ptr, c, c < ld)).to(dtype)  # [BM, BC]
        fc2 = tl.load(fc2_weight_ptr + col[None, :] * ld + c[:, None], in_col[None, :] & (c < ld)[:, None], 0.0)
        y = tl.dot(active, fc2, y, input_precision=PRECISION)
    y += load_row(fc2_bias_ptr, col, in_col) + tl.load(out_ptrs, keep, 0.0).to(tl.float32)
    centred, rstd = row_statistics(y, counts, D, eps)
    y = centred * rstd[:, None] * load_row(norm2_weight_ptr, col, in_col) + load_row(norm2_bias_ptr, col, in_col)
    tl.debug_barrier()  # nobody reads the hidden rows any more
    tl.store(out_ptrs, y.to(dtype), keep)


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def sum_rows(sums_ptr, col, in_col, x):
    tl.store(sums_ptr + col, tl.sum(x, 0), in_col)


@triton.jit(do_not_specialize=["M", "D"])
def _freenet_block_bwd_kernel(
    d_out_ptr, features_ptr, state_ptr, proj_weight_ptr, proj_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, norm2_weight_ptr,
    d_features_ptr, d_state_ptr, hidden_ptr, active_ptr, d_inner_ptr, d_mlp_ptr, d_branch_ptr, sums_ptr,
    M, D, ld, eps,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HAS_STATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes d_features, d_state, the factors of the weights' gradients (hidden, active, d_inner, d_mlp, d_branch),
    and sums [programs, 7, ld] over its rows: the gradients of the vectors, in the order of `VECTORS`.

    Until their own values come, d_branch holds the normalised projection and d_inner the input of GELU. What stands
    beyond D in a result has no meaning; as operand of a product it meets weights of zero.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    in_row, in_col = row < M, col < ld
    keep = in_row[:, None] & in_col[None, :]
    counts = (col < D)[None, :]
    at = row[:, None] * ld + col[None, :]
    dtype = d_features_ptr.dtype.element_ty
    sums_ptr += program * 7 * ld

    x = tl.zeros((BM, BD), tl.float32)
    x = multiply(features_ptr, ld, 1, row, in_row, proj_weight_ptr, ld, 1, col, in_col, ld, BK, x, PRECISION)
    x += load_row(proj_bias_ptr, col, in_col)
    if HAS_STATE and SUM:
        x += tl.load(state_ptr + row[:, None] * ld + col[None, :], keep, 0.0).to(tl.float32)
    centred, rstd1 = row_statistics(x, counts, D, eps)
    x = centred * rstd1[:, None]
    tl.store(d_branch_ptr + at, x.to(dtype), keep)
    x = x * load_row(norm1_weight_ptr, col, in_col) + load_row(norm1_bias_ptr, col, in_col)
    if HAS_STATE and not SUM:
        x += tl.load(state_ptr + row[:, None] * ld + col[None, :], keep, 0.0).to(tl.float32)
    tl.store(hidden_ptr + at, x.to(dtype), keep)
    tl.debug_barrier()  # the other threads read these rows next

    y = tl.zeros((BM, BD), tl.float32)
    for first in range(0, ld, BC):
        c = first + tl.arange(0, BC)
        inner_at, inner_keep = row[:, None] * ld + c[None, :], in_row[:, None] & (c < ld)[None, :]
        inner = tl.zeros((BM, BC), tl.float32)
        inner = multiply(hidden_ptr, ld, 1, row, in_row, fc1_weight_ptr, ld, 1, c, c < ld, ld, BK, inner, PRECISION)
        inner += load_row(fc1_bias_ptr, c, c < ld)
        active = gelu(inner).to(dtype)
        tl.store(d_inner_ptr + inner_at, inner.to(dtype), inner_keep)
        tl.store(active_ptr + inner_at, active, inner_keep)
        fc2 = tl.load(fc2_weight_ptr + col[None, :] * ld + c[:, None], in_col[None, :] & (c < ld)[:, None], 0.0)
        y = tl.dot(active, fc2, y, input_precision=PRECISION)
    y += load_row(fc2_bias_ptr, col, in_col) + tl.load(hidden_ptr + at, keep, 0.0).to(tl.float32)
    centred, rstd2 = row_statistics(y, counts, D, eps)
    y = centred * rstd2[:, None]
    d_out = tl.load(d_out_ptr + at, keep, 0.0).to(tl.float32)
    sum_rows(sums_ptr + 5 * ld, col, in_col, d_out * y)
    sum_rows(sums_ptr + 6 * ld, col, in_col, d_out)
    weight = tl.load(norm2_weight_ptr + col, in_col, 0.0).to(tl.float32)
    d_mlp = norm_backward(d_out, y, weight, rstd2, D)
    sum_rows(sums_ptr + 4 * ld, col, in_col, d_mlp)
    tl.store(d_mlp_ptr + at, d_mlp.to(dtype), keep)
    tl.debug_barrier()

    d_hidden = tl.zeros((BM, BD), tl.float32)
    for first in range(0, ld, BC):
        c = first + tl.arange(0, BC)
        inner_at, inner_keep = row[:, None] * ld + c[None, :], in_row[:, None] & (c < ld)[None, :]
        d_inner = tl.zeros((BM, BC), tl.float32)
        d_inner = multiply(d_mlp_ptr, ld, 1, row, in_row, fc2_weight_ptr, 1, ld, c, c < ld, ld, BK, d_inner, PRECISION)
        d_inner *= gelu_slope(tl.load(d_inner_ptr + inner_at, inner_keep, 0.0).to(tl.float32))
        sum_rows(sums_ptr + 3 * ld, c, c < ld, d_inner)
        tl.store(d_inner_ptr + inner_at, d_inner.to(dtype), inner_keep)
        fc1 = tl.load(fc1_weight_ptr + c[:, None] * ld + col[None, :], (c < ld)[:, None] & in_col[None, :], 0.0)
        d_hidden = tl.dot(d_inner.to(dtype), fc1, d_hidden, input_precision=PRECISION)
    d_hidden += tl.load(d_mlp_ptr + at, keep, 0.0).to(tl.float32)
    x = tl.load(d_branch_ptr + at, keep, 0.0).to(tl.float32)
    sum_rows(sums_ptr + 1 * ld, col, in_col, d_hidden * x)
    sum_rows(sums_ptr + 2 * ld, col, in_col, d_hidden)
    if HAS_STATE and not SUM:
        tl.store(d_state_ptr + at, d_hidden.to(dtype), keep)
    weight = tl.load(norm1_weight_ptr + col, in_col, 0.0).to(tl.float32)
    d_branch = norm_backward(d_hidden, x, weight, rstd1, D)
    sum_rows(sums_ptr, col, in_col, d_branch)
    if HAS_STATE and SUM:
        tl.store(d_state_ptr + at, d_branch.to(dtype), keep)
    tl.debug_barrier()  # every thread has read what d_branch held before
    tl.store(d_branch_ptr + at, d_branch.to(dtype), keep)
    tl.debug_barrier()

    x = tl.zeros((BM, BD), tl.float32)
    x = multiply(d_branch_ptr, ld, 1, row, in_row, proj_weight_ptr, 1, ld, col, in_col, ld, BK, x, PRECISION)
    tl.store(d_features_ptr + at, x.to(dtype), keep)


CHUNK = 16384
"""Tokens that the backward pass takes at a time: enough programs to fill a GPU once or twice, and no more memory."""

MATRICES, VECTORS = (0, 4, 6), (1, 2, 3, 5, 7, 8, 9)
"""Where the three matrices stand among the ten weights, and the vectors: the projection's bias, the first norm's two,
the biases of both linears, the second norm's two."""


def freenet_block_fwd_meta(D: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks for width D: BM tokens, BK columns of a product's operands, BC hidden columns of the MLP at a time."""
    BD = block(D)
    if BD == 512:  # 64 rows of float32 would spill; 32 go through mma, not wgmma, on Hopper
        return {"BM": 32, "BD": BD, "BK": 32, "BC": 32, "num_warps": 8, "num_stages": 2}
    wide = 64 if BD == 256 and itemsize == 2 else 32
    registers = itemsize == 4 and precision == "ieee"  # no tensor cores: operands come through registers
    return {"BM": 64, "BD": BD, "BK": wide, "BC": min(BD, wide),
            "num_warps": 4 if BD < 128 or (BD == 128 and not registers) else 8,
            "num_stages": 2 if precision == "ieee" else 3}  # fmt: skip


def freenet_block_bwd_meta(D: int, precision: str, itemsize: int) -> dict[str, int]:
    """The same for the backward kernel, which holds more at a time."""
    BD = block(D)
    if itemsize == 4 and precision == "ieee":
        BM, narrow, warps, stages = {128: (32, 32, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 16, 1)}.get(
            BD, (64, 32, 8 if BD == 64 else 4, 2))  # fmt: skip
    elif itemsize == 4:
        BM, narrow, warps, stages = {128: (64, 32, 8, 3), 256: (32, 32, 8, 3), 512: (32, 16, 16, 2)}.get(
            BD, (64, 32, 8 if BD == 64 else 4, 3))  # fmt: skip
    else:
        BM, narrow, warps, stages = {128: (64, 32, 8, 3), 256: (64, 32, 8, 3), 512: (32, 32, 8, 2)}.get(
            BD, (64, 32, 4, 3))  # fmt: skip
    return {"BM": BM, "BD": BD, "BK": narrow, "BC": min(BD, narrow), "num_warps": warps, "num_stages": stages}


def _padded_weights(weights: tuple[Tensor, ...], ld: int) -> list[Tensor]:
    return [padded(w, *(ld,) * w.ndim) for w in weights]


def freenet_block_fwd(features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str,
                      eps: float) -> Tensor:  # fmt: skip
    """features [N, J, D] and state (the same, or None), any strides; weights: the ten of `BlockWeights`, in its order
    and of the features' dtype; norm "branch" or "sum" -> [N, J, D]. D at most 512."""
    D = features.shape[-1]
    ld = up_to(D, 16)
    out = torch.empty(*features.shape[:-1], ld, device=features.device, dtype=features.dtype)
    if features.numel() == 0:
        return cut(out, *features.shape)
    precision = dot_precision(features.dtype)
    meta = freenet_block_fwd_meta(D, precision, features.element_size())
    M = features.numel() // D
    rows = padded(features.reshape(M, D), M, ld)
    first = state is None
    state = rows if first else padded(state.reshape(M, D), M, ld)
    with on_device_of(features):
        _freenet_block_fwd_kernel[(triton.cdiv(M, meta["BM"]),)](
            rows, state, *_padded_weights(weights, ld), out, M, D, ld, eps,
            HAS_STATE=not first, SUM=norm == "sum", PRECISION=precision, **meta,
        )  # fmt: skip
    return cut(out, *features.shape)


def freenet_block_bwd(
    d_out: Tensor, features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `freenet_block_fwd` for d_out [N, J, D], any strides: d_features, d_state or None, those of the
    weights at MATRICES [3, D, D] and at VECTORS [7, D]. Sums have one order everywhere, but for the library's matrix
    products."""
    shape, D = features.shape, features.shape[-1]
    ld = up_to(D, 16)
    dtype, weights = weights[0].dtype, _padded_weights(weights, ld)
    d_features = torch.empty(*shape[:-1], ld, device=features.device, dtype=features.dtype)
    d_state = None if state is None else torch.empty_like(d_features)
    M = features.numel() // D if D else 0
    matrices, vectors = (torch.empty(size, device=features.device, dtype=torch.float32)
                         for size in ((3, ld, ld), (7, ld)))  # fmt: skip
    if M == 0:
        matrices.zero_(), vectors.zero_()
    d_out, features, state = (None if t is None else t.reshape(M, D) for t in (d_out, features, state))
    buffers = torch.empty(5, min(M, CHUNK), ld, device=features.device, dtype=features.dtype)
    for start in range(0, M, CHUNK):
        rows = slice(start, start + CHUNK)
        count = len(features[rows])
        d_y, x, s = (None if t is None else padded(t[rows], count, ld) for t in (d_out, features, state))
        d_s = None if state is None else d_state.view(M, ld)[rows]
        hidden, active, d_inner, d_mlp, d_branch = factors = buffers[:, :count].unbind()
        sums = _backward_chunk(d_y, x, s, weights, d_features.view(M, ld)[rows], d_s, factors, D, norm, eps)
        vectors = vectors.add_(sums) if start else sums
        for total, d_product, operand in zip(matrices, (d_branch, d_inner, d_mlp), (x, hidden, active), strict=True):
            _add_product(total, d_product, operand, first=start == 0)
    return (cut(d_features, *shape), None if d_state is None else cut(d_state, *shape),
            cut(matrices, 3, D, D).to(dtype), cut(vectors, 7, D).to(dtype))


def _add_product(total: Tensor, d_product: Tensor, operand: Tensor, first: bool) -> None:
    """Add d_product^T operand to `total`, float32, or write it there if it is the `first`: in one launch, or two."""
    if d_product.dtype == torch.float32:
        total.addmm_(d_product.T, operand, beta=0 if first else 1)
    elif first:
        total.copy_(d_product.T @ operand)
    else:
        total += d_product.T @ operand


def _backward_chunk(d_out, features, state, weights, d_features, d_state, factors, D, norm, eps) -> Tensor:
    """Launch on one chunk of rows; returns the gradients of the vectors, [7, ld] float32."""
    M, ld = features.shape
    precision = dot_precision(features.dtype)
    meta = freenet_block_bwd_meta(D, precision, features.element_size())
    first = state is None
    state, d_state = (features, d_features) if first else (state, d_state)
    programs = triton.cdiv(M, meta["BM"])
    sums = torch.empty(programs, 7, ld, device=features.device, dtype=torch.float32)
    with on_device_of(features):
        _freenet_block_bwd_kernel[(programs,)](
            d_out, features, state, *weights[:9], d_features, d_state, *factors, sums, M, D, ld, eps,
            HAS_STATE=not first, SUM=norm == "sum", PRECISION=precision, **meta,
        )  # fmt: skip
    return sums.sum(0)
