"""One block of FReeNet (Eq. 4): as one kernel where its weights fit on chip, else as the library's products with all
that is between them fused. docs/math/freenet.md has the arithmetic.

Rows are `ld` values apart, a multiple of 16. Where D is none, launchers work on copies with zeros behind the D values:
addresses that are not a multiple of 16 bytes take registers each of their own, more than there are.

Nothing but the arguments is kept for the backward pass. It goes through the block again, CHUNK tokens at a time, and
leaves in buffers of that many rows what the gradients of the weights are products of; one kernel adds up those
products, or in float32 the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels import _freenet_narrow as narrow
from speedk.kernels import _freenet_wide as wide
from speedk.kernels._launch import block, cut, dot_precision, on_device_of, padded, up_to
from speedk.kernels._sums import sum_rows
from speedk.kernels._tiles import load_tile, store_tile

CHUNK = 16384
"""Tokens that the backward pass takes at a time, or a few less so that all are alike: enough programs to fill a GPU
once or twice, and no more memory."""

WIDE_CHUNK = 24576
"""The same for a wide block, of which each part is a launch of its own."""

WIDE_FORWARD = 65536
"""The same for its forward pass, which has fewer buffers."""

LEAST = 64
"""Programs that a chunk has at least, if there are as many: half of an H100's multiprocessors."""

NARROW = 128
"""Values of a token up to which the block is one kernel."""

SPLIT_PROGRAMS = 132
"""Programs that share the products over the tokens of a chunk, one for each multiprocessor of an H100. Fixed, so that
the sums have one order everywhere."""

MATRICES, VECTORS = (0, 4, 6), (1, 2, 3, 5, 7, 8, 9)
"""Where the three matrices stand among the ten weights, and the vectors: the projection's bias, the first norm's two,
the biases of both linears, the second norm's two."""


@triton.jit(do_not_specialize=["M", "tiles"])
def _freenet_block_products_kernel(
    factors_ptr, features_ptr, partial_ptr, M, size, ld, tiles,
    BM: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """partial [splits, 3, ld, ld], or what is ADDed to it: d_branch^T features, d_inner^T hidden and d_mlp^T active,
    each over `tiles` blocks of rows and BN x BN of its values. factors: d_branch, d_inner, d_mlp, hidden, active, each
    of `size` values; rows are ld apart."""
    split, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.cdiv(ld, BN)
    out = (tl.program_id(2) // blocks) * BN + tl.arange(0, BN)
    inn = (tl.program_id(2) % blocks) * BN + tl.arange(0, BN)
    row = tl.arange(0, BM)
    left_ptr = factors_ptr + which * size
    right_ptr = features_ptr
    if which > 0:
        right_ptr = factors_ptr + (which + 2) * size
    partial_ptr += (split * 3 + which) * ld * ld
    acc = tl.zeros((BN, BN), tl.float32)
    if ADD:
        acc = load_tile(partial_ptr, ld, out, out < ld, inn, inn < ld)
    for tile in range(tiles):
        first = (split * tiles + tile) * BM
        in_row = row < M - first
        left = load_tile(left_ptr + first * ld, ld, row, in_row, out, out < ld)
        right = load_tile(right_ptr + first * ld, ld, row, in_row, inn, inn < ld)
        acc = tl.dot(tl.trans(left), right, acc)
    store_tile(partial_ptr, ld, out, out < ld, inn, inn < ld, acc)


def freenet_block_products_meta(D: int) -> dict[str, int]:
    """Blocks of the products over the tokens."""
    return {"BM": 64, "BN": block(D, largest=128), "num_warps": 8, "num_stages": 3}


def _padded_weights(weights: tuple[Tensor, ...], ld: int) -> list[Tensor]:
    return [padded(w, *(ld,) * w.ndim) for w in weights]


def freenet_block_fwd(features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str,
                      eps: float) -> Tensor:
    """features [N, J, D] and state (the same, or None), any strides; weights: the ten of `BlockWeights`, in its order
    and of the features' dtype; norm "branch" or "sum" -> [N, J, D]. D at most 512."""
    D = features.shape[-1]
    ld = up_to(D, 16)
    out = torch.empty(*features.shape[:-1], ld, device=features.device, dtype=features.dtype)
    if features.numel() == 0:
        return cut(out, *features.shape)
    M = features.numel() // D
    rows, state = (None if t is None else padded(t.reshape(M, D), M, ld) for t in (features, state))
    given = rows, state, _padded_weights(weights, ld), out.view(M, ld), D, norm, eps
    with on_device_of(features):
        if block(D) > NARROW:
            wide.forward(*given, _even(M, WIDE_FORWARD))
        else:
            narrow.forward(*given, dot_precision(features.dtype))
    return cut(out, *features.shape)


def freenet_block_bwd(
    d_out: Tensor, features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `freenet_block_fwd` for d_out [N, J, D], any strides: d_features, d_state or None, those of the
    weights at MATRICES [3, D, D] and at VECTORS [7, D]. Sums have one order everywhere, but for the library's."""
    shape, D = features.shape, features.shape[-1]
    ld = up_to(D, 16)
    dtype, weights = weights[0].dtype, _padded_weights(weights, ld)
    d_features = torch.empty(*shape[:-1], ld, device=features.device, dtype=features.dtype)
    d_state = None if state is None else torch.empty_like(d_features)
    M = features.numel() // D if D else 0
    if M == 0:
        return (cut(d_features, *shape), None if state is None else cut(d_state, *shape),
                weights[0].new_zeros(3, D, D), weights[0].new_zeros(7, D))  # fmt: skip
    d_out, features, state = (None if t is None else t.reshape(M, D) for t in (d_out, features, state))
    precision = dot_precision(features.dtype)
    is_wide = _is_wide(D, precision)
    meta = wide.rows_meta(D) if is_wide else narrow.freenet_block_bwd_meta(D, precision, features.element_size())
    fused = meta.get("FUSED", False)
    size, most = 7 * ld + (3 * ld * ld if fused else 0), WIDE_CHUNK if is_wide else CHUNK
    if fused:  # the sums of a chunk's programs shall not take more memory than the features, unless it is little
        most = max(LEAST, min(triton.cdiv(most, meta["BM"]), d_features.nbytes // (4 * size))) * meta["BM"]
    chunk = _even(M, most)
    programs = triton.cdiv(chunk, meta["BM"])
    sums = torch.empty(min(programs, wide.PROGRAMS) if is_wide else programs, size, device=features.device,
                       dtype=torch.float32)  # fmt: skip
    buffers = None if fused else torch.empty(5, chunk, ld, device=features.device, dtype=features.dtype)
    partial = None
    with on_device_of(features):
        for start in range(0, M, chunk):
            rows, count = slice(start, start + chunk), min(chunk, M - start)
            d_y, x, s = (None if t is None else padded(t[rows], count, ld) for t in (d_out, features, state))
            factors = None if fused else buffers[:, :count]
            d_x, d_s = d_features.view(M, ld)[rows], None if s is None else d_state.view(M, ld)[rows]
            given = d_y, x, s, weights, d_x, d_s, factors, sums, D, norm, eps, start > 0
            if is_wide:
                wide.backward_chunk(*given)
            else:
                narrow.backward_chunk(*given, precision)
            if not fused:
                partial = _products(factors, x, partial)
        vectors, *matrices = sum_rows(sums, dtype, (7, ld), *([(3, ld, ld)] if fused else []))
        if not fused:
            whole = len(partial) == 1 and dtype == torch.float32
            matrices = [partial[0]] if whole else sum_rows(partial.view(len(partial), -1), dtype, (3, ld, ld))
    return (cut(d_features, *shape), None if d_state is None else cut(d_state, *shape),
            cut(matrices[0], 3, D, D), cut(vectors, 7, D))


def _is_wide(D: int, precision: str) -> bool:
    """Whether the backward pass is that of a wide block: in full float32 from where the operands, in two halves, take
    more registers than there are."""
    return block(D) > (NARROW // 2 if precision == "tf32x3" else NARROW)


def _even(M: int, most: int) -> int:
    """Rows of a chunk so that there are as many chunks as of `most` rows, all about alike."""
    return up_to(triton.cdiv(M, triton.cdiv(M, most)), 64) if most < M else M


def _products(factors: Tensor, features: Tensor, partial: Tensor | None) -> Tensor:
    """Partial sums [splits, 3, ld, ld] of the gradients of the matrices over a chunk's rows, added to `partial`, which
    the first and largest chunk makes.

    In float32 they are the library's, which splits the rows itself: the tensor cores take operands of that type only
    the other way round than they lie here.
    """
    M, ld = features.shape
    more = partial is not None
    if features.element_size() == 4:
        partial = partial if more else torch.empty(1, 3, ld, ld, device=features.device, dtype=torch.float32)
        d_branch, d_inner, d_mlp, hidden, active = factors.unbind()
        for out, left, right in zip(partial[0], (d_branch, d_inner, d_mlp), (features, hidden, active), strict=True):
            if more:
                out.addmm_(left.T, right)
            else:
                torch.mm(left.T, right, out=out)
        return partial
    meta = freenet_block_products_meta(ld)
    columns = triton.cdiv(ld, meta["BN"]) ** 2
    if not more:
        splits = min(triton.cdiv(M, meta["BM"]), max(1, SPLIT_PROGRAMS // (3 * columns)))
        partial = torch.empty(splits, 3, ld, ld, device=features.device, dtype=torch.float32)
    tiles = triton.cdiv(triton.cdiv(M, meta["BM"]), len(partial))
    _freenet_block_products_kernel[(len(partial), 3, columns)](
        factors, features, partial, M, factors.stride(0), ld, tiles, ADD=more, **meta
    )
    return partial
