"""One block of FReeNet (Eq. 4) in one pass over the tokens.

A program carries BM tokens through the block: projection, first norm, both linears of the MLP, second norm. What does
not fit in registers, the BM hidden rows Z' as the operand of the next product, takes the place in `out` where the
result will go in the end: written and read back by the same program, it stays in the caches. So device memory sees
the features and the state once and the result once, whatever D is. The weights stream from the second-level cache a
block of columns at a time; docs/math/freenet.md has the arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, dot_precision, on_device_of
from speedk.kernels._tiles import load_row, multiply
from speedk.kernels.add_layer_norm import row_statistics


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["M"])
def _freenet_block_fwd_kernel(
    features_ptr, state_ptr, proj_weight_ptr, proj_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, norm2_weight_ptr, norm2_bias_ptr, out_ptr,
    M, D, eps, features_row, features_col, state_row, state_col,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HAS_STATE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    in_row, in_col = row < M, col < D
    keep = in_row[:, None] & in_col[None, :]
    out_ptrs = out_ptr + row[:, None] * D + col[None, :]
    dtype = out_ptr.dtype.element_ty

    x = tl.zeros((BM, BD), tl.float32)
    x = multiply(features_ptr, features_row, features_col, row, in_row, proj_weight_ptr, D, 1, col, in_col, D, BK, x,
                 PRECISION)  # fmt: skip
    x += load_row(proj_bias_ptr, col, in_col)
    if HAS_STATE and SUM:
        x += tl.load(state_ptr + row[:, None] * state_row + col[None, :] * state_col, keep, 0.0).to(tl.float32)
    centred, rstd = row_statistics(x, keep, D, eps)
    hidden = centred * rstd[:, None] * load_row(norm1_weight_ptr, col, in_col) + load_row(norm1_bias_ptr, col, in_col)
    if HAS_STATE and not SUM:
        hidden += tl.load(state_ptr + row[:, None] * state_row + col[None, :] * state_col, keep, 0.0).to(tl.float32)
    tl.store(out_ptrs, hidden.to(dtype), keep)
    tl.debug_barrier()  # the other threads read these rows next

    y = tl.zeros((BM, BD), tl.float32)
    for first in range(0, D, BC):
        c = first + tl.arange(0, BC)
        inner = tl.zeros((BM, BC), tl.float32)
        inner = multiply(out_ptr, D, 1, row, in_row, fc1_weight_ptr, D, 1, c, c < D, D, BK, inner, PRECISION)
        active = gelu(inner + load_row(fc1_bias_ptr, c, c < D)).to(dtype)  # [BM, BC]
        fc2 = tl.load(fc2_weight_ptr + col[None, :] * D + c[:, None], in_col[None, :] & (c < D)[:, None], 0.0)
        y = tl.dot(active, fc2, y, input_precision=PRECISION)
    y += load_row(fc2_bias_ptr, col, in_col) + tl.load(out_ptrs, keep, 0.0).to(tl.float32)
    centred, rstd = row_statistics(y, keep, D, eps)
    y = centred * rstd[:, None] * load_row(norm2_weight_ptr, col, in_col) + load_row(norm2_bias_ptr, col, in_col)
    tl.debug_barrier()  # nobody reads the hidden rows any more
    tl.store(out_ptrs, y.to(dtype), keep)


MAX_WIDTH = 512
"""The widest D whose rows a program holds."""


def freenet_block_meta(D: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks for width D: BM tokens, BK columns of a product's operands, BC hidden columns of the MLP at a time."""
    BD = block(D)
    if BD == 512:  # 64 rows of float32 would spill; 32 go through mma, not wgmma, on Hopper
        return {"BM": 32, "BD": BD, "BK": 32, "BC": 32, "num_warps": 8, "num_stages": 2}
    wide = 64 if BD == 256 and itemsize == 2 else 32
    return {"BM": 64, "BD": BD, "BK": wide, "BC": min(BD, wide), "num_warps": 4 if BD <= 128 else 8,
            "num_stages": 2 if precision == "ieee" else 3}  # fmt: skip


def freenet_block_fwd(features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str,
                      eps: float) -> Tensor:  # fmt: skip
    """features [N, J, D] and state (the same, or None), any strides; weights: the ten of `BlockWeights`, in its order
    and of the features' dtype; norm "branch" or "sum" -> [N, J, D]. D at most MAX_WIDTH."""
    D = features.shape[-1]
    out = torch.empty(features.shape, device=features.device, dtype=features.dtype)
    if out.numel() == 0:
        return out
    features = features.reshape(-1, D)
    first = state is None
    state = features if first else state.reshape(-1, D)
    precision = dot_precision(features.dtype)
    meta = freenet_block_meta(D, precision, features.element_size())
    M = len(features)
    with on_device_of(features):
        _freenet_block_fwd_kernel[(triton.cdiv(M, meta["BM"]),)](
            features, state, *(w.contiguous() for w in weights), out, M, D, eps, *features.stride(), *state.stride(),
            HAS_STATE=not first, SUM=norm == "sum", PRECISION=precision, **meta,
        )  # fmt: skip
    return out
