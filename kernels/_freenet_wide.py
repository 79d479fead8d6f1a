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

from speedk.kernels._launch import block, up_to
from speedk.kernels._tiles import as_operand, gelu, gelu_slope, load_row, load_tile, store_tile

PROGRAMS = 264
"""Programs that share the rows in the backward pass, each with a sum over its own: two for each multiprocessor of an
H100. Fixed, so that these sums are added in one order everywhere."""


@triton.jit
def _load_rows(ptr, ld, row, in_row, T: tl.constexpr, BC: tl.constexpr):
    """Rows as T tiles [BM, BC] float32, zero where there is nothing: D 192 as three times 64 columns fills no register
    in vain, and a row of a tile lies in 8 or 16 threads, so that a warp sums up several rows at a time."""
    tiles = ()
    for i in tl.static_range(T):
        col = i * BC + tl.arange(0, BC)
        tiles += (load_tile(ptr, ld, row, in_row, col, col < ld).to(tl.float32),)
    return tiles


@triton.jit
def _store_rows(ptr, ld, row, in_row, tiles, BC: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        col = i * BC + tl.arange(0, BC)
        store_tile(ptr, ld, row, in_row, col, col < ld, tiles[i].to(ptr.dtype.element_ty))


@triton.jit
def _load_vector(ptr, ld, T: tl.constexpr, BC: tl.constexpr):
    """A vector as T tiles [1, BC] float32."""
    tiles = ()
    for i in tl.static_range(T):
        col = i * BC + tl.arange(0, BC)
        tiles += (load_row(ptr, col, col < ld),)
    return tiles


@triton.jit
def _load_sums(sums_ptr, ld, row, there, T: tl.constexpr, BC: tl.constexpr):
    """Sums of rows to be, T tiles [BM, BC]: in the first row, and the columns before `there`, what is there."""
    tiles = ()
    for i in tl.static_range(T):
        col = i * BC + tl.arange(0, BC)
        tiles += (load_tile(sums_ptr, ld, row, row == 0, col, col < there),)
    return tiles


@triton.jit
def _store_sums(sums_ptr, ld, tiles, BC: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        col = i * BC + tl.arange(0, BC)
        tl.store(sums_ptr + col, tl.sum(tiles[i], 0), col < ld)


@triton.jit
def _plus(x, y):
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles += (x[i] + y[i],)
    return tiles


@triton.jit
def _times(x, y):
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles += (x[i] * y[i],)
    return tiles


@triton.jit
def _row_mean(x, D):
    """[BM, 1]"""
    total = x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i]
    return (tl.sum(total, 1) / D)[:, None]


@triton.jit
def _normalised(x, D, eps, BC: tl.constexpr, PADDED: tl.constexpr):
    """`row_statistics`, of rows in tiles: the normalised rows and 1 / standard deviation [BM, 1]."""
    mean = _row_mean(x, D)
    centred = ()
    for i in tl.static_range(len(x)):
        tile = x[i] - mean
        if PADDED:
            tile = tl.where((i * BC + tl.arange(0, BC) < D)[None, :], tile, 0.0)
        centred += (tile,)
    rstd = tl.rsqrt(_row_mean(_times(centred, centred), D) + eps)
    normalised = ()
    for i in tl.static_range(len(x)):
        normalised += (centred[i] * rstd,)
    return normalised, rstd


@triton.jit
def _norm_backward(d_y, normalised, weight, rstd, D):
    """`norm_backward`, of rows in tiles."""
    scaled = _times(d_y, weight)
    mean = _row_mean(_times(scaled, normalised), D)
    along = ()
    for i in tl.static_range(len(d_y)):
        along += (scaled[i] - normalised[i] * mean,)
    mean = _row_mean(along, D)
    d_x = ()
    for i in tl.static_range(len(d_y)):
        d_x += ((along[i] - mean) * rstd,)
    return d_x


@triton.jit(do_not_specialize=["M", "D"])
def _rows_norm_fwd_kernel(
    x_ptr, x_bias_ptr, before_ptr, after_ptr, weight_ptr, bias_ptr, out_ptr, M, D, ld, eps,
    BM: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, PADDED: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """out = norm(x + x_bias + before) + after, all [M, ld] but the vectors."""
    first = tl.program_id(0).to(tl.int64) * BM
    row = tl.arange(0, BM)
    in_row = row < M - first
    base = first * ld
    x = _plus(_load_rows(x_ptr + base, ld, row, in_row, T, BC), _load_vector(x_bias_ptr, ld, T, BC))
    if HAS_BEFORE:
        x = _plus(x, _load_rows(before_ptr + base, ld, row, in_row, T, BC))
    x, _ = _normalised(x, D, eps, BC, PADDED)
    x = _plus(_times(x, _load_vector(weight_ptr, ld, T, BC)), _load_vector(bias_ptr, ld, T, BC))
    if HAS_AFTER:
        x = _plus(x, _load_rows(after_ptr + base, ld, row, in_row, T, BC))
    _store_rows(out_ptr + base, ld, row, in_row, x, BC)


@triton.jit(do_not_specialize=["M", "D", "tiles", "there"])
def _rows_norm_bwd_kernel(
    d_out_ptr, more_ptr, x_ptr, x_bias_ptr, before_ptr, weight_ptr, d_x_ptr, total_ptr, sums_ptr,
    M, D, ld, eps, tiles, there,
    BM: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, PADDED: tl.constexpr,
    HAS_MORE: tl.constexpr, HAS_BEFORE: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """The gradient d_x of norm(x + x_bias + before) for d_out + more, which goes to `total`, too; and over the rows of
    `tiles` blocks, in the columns before `there` added to what is there, the sums [programs, 7 ld] of d_x, of the
    gradient of the norm's weight, and of its bias."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BM)
    sums_ptr += program * 7 * ld
    sum_x = _load_sums(sums_ptr, ld, row, there, T, BC)
    sum_weight = _load_sums(sums_ptr + ld, ld, row, there, T, BC)
    sum_bias = _load_sums(sums_ptr + 2 * ld, ld, row, there, T, BC)
    for tile in range(tiles):
        first = (program * tiles + tile) * BM
        in_row = row < M - first
        base = first * ld
        x = _plus(_load_rows(x_ptr + base, ld, row, in_row, T, BC), _load_vector(x_bias_ptr, ld, T, BC))
        d_out = _load_rows(d_out_ptr + base, ld, row, in_row, T, BC)
        if HAS_BEFORE:
            x = _plus(x, _load_rows(before_ptr + base, ld, row, in_row, T, BC))
        if HAS_MORE:
            d_out = _plus(d_out, _load_rows(more_ptr + base, ld, row, in_row, T, BC))
        if HAS_TOTAL:
            _store_rows(total_ptr + base, ld, row, in_row, d_out, BC)
        x, rstd = _normalised(x, D, eps, BC, PADDED)
        sum_weight = _plus(sum_weight, _times(d_out, x))
        sum_bias = _plus(sum_bias, d_out)
        x = _norm_backward(d_out, x, _load_vector(weight_ptr, ld, T, BC), rstd, D)
        sum_x = _plus(sum_x, x)
        operand = ()
        for i in tl.static_range(T):
            counts = (i * BC + tl.arange(0, BC) < D)[None, :]
            operand += (as_operand(x[i], counts, d_x_ptr.dtype.element_ty),)
        _store_rows(d_x_ptr + base, ld, row, in_row, operand, BC)
    _store_sums(sums_ptr, ld, sum_x, BC)
    _store_sums(sums_ptr + ld, ld, sum_weight, BC)
    _store_sums(sums_ptr + 2 * ld, ld, sum_bias, BC)


@triton.jit(do_not_specialize=["M"])
def _rows_gelu_fwd_kernel(x_ptr, bias_ptr, out_ptr, M, ld, BM: tl.constexpr, BC: tl.constexpr):
    """out = GELU(x + bias)."""
    first = tl.program_id(0).to(tl.int64) * BM
    row, col = tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    in_row, in_col = row < M - first, col < ld
    x = load_tile(x_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32) + load_row(bias_ptr, col, in_col)
    store_tile(out_ptr + first * ld, ld, row, in_row, col, in_col, gelu(x).to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "tiles", "there"])
def _rows_gelu_bwd_kernel(d_out_ptr, x_ptr, bias_ptr, sums_ptr, M, ld, tiles, there,
                          BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """The gradient of GELU(x + bias) takes the place of x; its sum over rows as above."""
    program = tl.program_id(0).to(tl.int64)
    row, col = tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    in_col = col < ld
    sums_ptr += program * 7 * ld
    bias = load_row(bias_ptr, col, in_col)
    total = load_tile(sums_ptr, ld, row, row == 0, col, col < there)
    for tile in range(tiles):
        first = (program * tiles + tile) * BM
        in_row = row < M - first
        x = load_tile(x_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32)
        d_out = load_tile(d_out_ptr + first * ld, ld, row, in_row, col, in_col).to(tl.float32)
        x = d_out * gelu_slope(x + bias)
        total += x
        store_tile(x_ptr + first * ld, ld, row, in_row, col, in_col, x.to(x_ptr.dtype.element_ty))
    tl.store(sums_ptr + col, tl.sum(total, 0), in_col)


def rows_meta(D: int) -> dict[str, int]:
    """Blocks of the kernels of norms: three tiles or four, 8 values each a thread."""
    BC = max(32, block(D) // 4)
    T = triton.cdiv(up_to(D, 16), BC)
    return {"BM": max(1, 1024 // BC), "T": T, "BC": BC, "PADDED": D < T * BC, "num_warps": 4}


def gelu_meta(itemsize: int) -> dict[str, int]:
    """Blocks of GELU's kernels: 16 bytes of two rows a thread."""
    return {"BM": 32 if itemsize == 2 else 16, "BC": 64, "num_warps": 4}


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


def _mlp(hidden: Tensor, weights: list[Tensor], inner: Tensor, active: Tensor, mlp: Tensor) -> None:
    """Fill the input of GELU, what it gives, and the result of the MLP, the first and the last without their biases,
    all [M, ld]; the last may be the first."""
    M, ld = hidden.shape
    meta = gelu_meta(hidden.element_size())
    torch.mm(hidden, weights[4].T, out=inner)
    _rows_gelu_fwd_kernel[(triton.cdiv(M, meta["BM"]), triton.cdiv(ld, meta["BC"]))](
        inner, weights[5], active, M, ld, **meta
    )
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
        _mlp(hidden, weights, inner, active, inner)
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
    meta, of_gelu = rows_meta(D), gelu_meta(features.element_size())
    tiles = triton.cdiv(triton.cdiv(M, meta["BM"]), len(sums))
    grid, there, summed = (len(sums),), ld * more, norm == "sum"
    branch, inner, mlp, hidden, active = buffers.unbind()
    scratch = d_features  # until its own values come
    _hidden(features, state, weights, branch, hidden, D, norm, eps)
    _mlp(hidden, weights, inner, active, mlp)
    _rows_norm_bwd_kernel[grid](
        d_out, d_out, mlp, weights[7], hidden, weights[8], mlp, mlp, sums[0, 4 * ld:], M, D, ld, eps, tiles, there,
        HAS_MORE=False, HAS_BEFORE=True, HAS_TOTAL=False, **meta,
    )  # fmt: skip
    torch.mm(mlp, weights[6], out=scratch)
    _rows_gelu_bwd_kernel[len(sums), triton.cdiv(ld, of_gelu["BC"])](
        scratch, inner, weights[5], sums[0, 3 * ld:], M, ld, triton.cdiv(triton.cdiv(M, of_gelu["BM"]), len(sums)),
        there, **of_gelu,
    )  # fmt: skip
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
