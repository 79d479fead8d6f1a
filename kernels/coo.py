"""Stored codes: decode them, and sparse coding straight from them.

Entries of one (image, head) come in order of j K + k from `coo_encode`, and the kernels are made for that order; they
see for themselves where it does not hold and then take a slower way to the same result, in which entries of one
coordinate add up too. Nothing uses atomics on floats: equal inputs give equal bits. An index out of range is left out,
never followed, and raises the flag that each launcher returns (int32 [1] on the device, read by whoever can afford to
wait for it; None where no check is asked for, as clearing a flag is a launch of its own).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, dot_precision, on_device_of
from speedk.kernels._sums import sum_rows


@triton.jit
def _load_index(ptr, at, keep):
    return tl.load(ptr + at, keep, 0).to(tl.int32)


@triton.jit
def _fetch(rows_ptr, cols_ptr, e, k):
    """Rows and columns of entries e, and those of the entries before them, as they are stored."""
    there, later = e < k, (e < k) & (e > 0)
    return (tl.load(rows_ptr + e, there, 0), tl.load(cols_ptr + e, there, 0),
            tl.load(rows_ptr + e - 1, later, 0), tl.load(cols_ptr + e - 1, later, 0))  # fmt: skip


@triton.jit
def _examine(fetched, e, k, J, K):
    """Of entries e: rows, columns, which are there and fit, and 1 where out of order plus 2 where out of range."""
    row, col = fetched[0].to(tl.int32), fetched[1].to(tl.int32)
    row_before, col_before = fetched[2].to(tl.int32), fetched[3].to(tl.int32)
    in_order = (row_before < row) | ((row_before == row) & (col_before < col))
    fits = (row >= 0) & (row < J) & (col >= 0) & (col < K)
    fault = ((e < k) & (e > 0) & ~in_order).to(tl.int32) + 2 * ((e < k) & ~fits).to(tl.int32)
    return row, col, (e < k) & fits, fault


@triton.jit
def _place(values_ptr, rows_ptr, cols_ptr, dense_ptr, value, row, col, fits, low, k, K, fault, BO: tl.constexpr):
    value = value.to(tl.float32)
    if fault & 1:  # there may be several of one coordinate: each of them stores the sum of all
        value = tl.zeros(row.shape, tl.float32)
        for other in range(0, k):
            same = (row == tl.load(rows_ptr + other).to(tl.int32)) & (col == tl.load(cols_ptr + other).to(tl.int32))
            value += tl.where(same, tl.load(values_ptr + other).to(tl.float32), 0.0)
    at = row.to(tl.int64) * K + col - low
    tl.store(dense_ptr + at, value.to(dense_ptr.dtype.element_ty), fits & (at >= 0) & (at < BO))


@triton.jit(do_not_specialize=["k", "tiles"])
def _coo_decode_fwd_kernel(
    values_ptr, rows_ptr, cols_ptr, dense_ptr, bad_ptr, k, J, K, tiles,
    BE: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A program fills BO elements of one matrix [J, K]: zeros, then those of its k entries that fall inside. The first
    BE entries are fetched at once, values and all, and wait for memory once."""
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    low = (tl.program_id(0) % tiles).to(tl.int64) * BO
    size = tl.cast(J, tl.int64) * K  # J = 1 is a constant, without methods of its own
    dense_ptr += matrix * size + low
    values_ptr += matrix * k
    rows_ptr += matrix * k
    cols_ptr += matrix * k
    inside = tl.arange(0, BO)
    rest = tl.minimum(size - low, BO).to(tl.int32)
    tl.store(dense_ptr + inside, tl.zeros((BO,), dense_ptr.dtype.element_ty), inside < rest)
    e = tl.arange(0, BE)
    fetched, value = _fetch(rows_ptr, cols_ptr, e, k), tl.load(values_ptr + e, e < k, 0.0)
    tl.debug_barrier()  # the zeros of all threads come before any entry

    row, col, fits, fault = _examine(fetched, e, k, J, K)
    for start in range(BE, k, BE):
        fault |= _examine(_fetch(rows_ptr, cols_ptr, start + e, k), start + e, k, J, K)[3]
    fault = tl.reduce_or(fault, 0)
    if bad_ptr is not None:
        tl.store(bad_ptr, 1, fault > 1)
    _place(values_ptr, rows_ptr, cols_ptr, dense_ptr, value, row, col, fits, low, k, K, fault, BO)
    for start in range(BE, k, BE):
        row, col, fits, _ = _examine(_fetch(rows_ptr, cols_ptr, start + e, k), start + e, k, J, K)
        value = tl.load(values_ptr + start + e, fits, 0.0)
        _place(values_ptr, rows_ptr, cols_ptr, dense_ptr, value, row, col, fits, low, k, K, fault, BO)


@triton.jit(do_not_specialize=["k", "blocks"])
def _coo_decode_bwd_kernel(
    d_dense_ptr, rows_ptr, cols_ptr, d_values_ptr, k, H, J, K, blocks, d_n, d_h, d_j, d_k,
    BE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    matrix = program // blocks
    e = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE)
    row, col = _load_index(rows_ptr + matrix * k, e, e < k), _load_index(cols_ptr + matrix * k, e, e < k)
    fits = (e < k) & (row >= 0) & (row < J) & (col >= 0) & (col < K)
    d_dense_ptr += (matrix // H) * d_n + (matrix % H) * d_h
    d_value = tl.load(d_dense_ptr + row.to(tl.int64) * d_j + col.to(tl.int64) * d_k, fits, 0.0)
    tl.store(d_values_ptr + matrix * k + e, d_value, e < k)


@triton.jit
def _first_of(rows_ptr, row, k, STEPS: tl.constexpr):
    """The number of the k ordered entries whose row lies before each of `row`, by bisection."""
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + k
    for _ in range(STEPS):
        middle = (low + high) // 2
        before = (_load_index(rows_ptr, middle, middle < high) < row) & (middle < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["k"])
def _mhsc_coo_fwd_kernel(
    values_ptr, rows_ptr, cols_ptr, saet_ptr, out_ptr, bad_ptr, k, H, J, K, d, saet_k, saet_d,
    BE: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program makes BJ tokens of one image and head: each token sums its own run of the ordered entries."""
    matrix = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    c = tl.program_id(2) * BD + tl.arange(0, BD)
    n, h = matrix // H, matrix % H
    values_ptr += matrix * k
    rows_ptr += matrix * k
    cols_ptr += matrix * k
    saet_ptrs = saet_ptr + (h * d + c) * saet_d

    disorder = 0
    bad = 0
    for start in range(0, k, BE):
        e = start + tl.arange(0, BE)
        row, col = _load_index(rows_ptr, e, e < k), _load_index(cols_ptr, e, e < k)
        later = (e < k) & (e > 0)
        disorder += tl.sum((later & (_load_index(rows_ptr, e - 1, later) > row)).to(tl.int32), 0)
        fits = (row >= 0) & (row < J) & (col >= 0) & (col < K)
        bad += tl.sum(((e < k) & ~fits).to(tl.int32), 0)
    if bad_ptr is not None:
        tl.store(bad_ptr, 1, bad > 0)

    acc = tl.zeros((BJ, BD), tl.float32)
    if disorder > 0:
        for e in range(0, k):
            row, col = tl.load(rows_ptr + e).to(tl.int32), tl.load(cols_ptr + e).to(tl.int64)
            token = tl.load(saet_ptrs + col * saet_k, c < tl.where((col >= 0) & (col < K), d, 0), 0.0).to(tl.float32)
            value = tl.where(j == row, tl.load(values_ptr + e).to(tl.float32), 0.0)
            acc += value[:, None] * token[None, :]
    else:
        first, last = _first_of(rows_ptr, j, k, STEPS), _first_of(rows_ptr, j + 1, k, STEPS)
        for step in range(0, tl.max(last - first, 0)):
            e = first + step
            col = _load_index(cols_ptr, e, e < last).to(tl.int64)
            keep = (e < last) & (col >= 0) & (col < K)
            value = tl.load(values_ptr + e, keep, 0.0).to(tl.float32)
            token = tl.load(saet_ptrs[None, :] + col[:, None] * saet_k, keep[:, None] & (c < d)[None, :], 0.0)
            acc += value[:, None] * token.to(tl.float32)
    out_ptrs = out_ptr + ((n * J + j) * H + h)[:, None] * d + c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (j < J)[:, None] & (c < d)[None, :])


@triton.jit(do_not_specialize=["k", "blocks"])
def _mhsc_coo_values_bwd_kernel(
    d_out_ptr, rows_ptr, cols_ptr, saet_ptr, d_values_ptr, k, H, J, K, d, blocks,
    d_out_n, d_out_j, d_out_d, saet_k, saet_d,
    BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """d_values[n, h, e] = d_out[n, row_e, head h] . saet[col_e, head h]."""
    program = tl.program_id(0).to(tl.int64)
    matrix = program // blocks
    e = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE)
    n, h = matrix // H, matrix % H
    row = _load_index(rows_ptr + matrix * k, e, e < k).to(tl.int64)
    col = _load_index(cols_ptr + matrix * k, e, e < k).to(tl.int64)
    fits = (e < k) & (row >= 0) & (row < J) & (col >= 0) & (col < K)
    acc = tl.zeros((BE, BD), tl.float32)
    for start in range(0, d, BD):
        c = start + tl.arange(0, BD)
        keep = fits[:, None] & (c < d)[None, :]
        channel = (h * d + c)[None, :]
        d_out = tl.load(d_out_ptr + n * d_out_n + row[:, None] * d_out_j + channel * d_out_d, keep, 0.0)
        token = tl.load(saet_ptr + col[:, None] * saet_k + channel * saet_d, keep, 0.0)
        acc += d_out.to(tl.float32) * token.to(tl.float32)
    tl.store(d_values_ptr + matrix * k + e, tl.sum(acc, 1).to(d_values_ptr.dtype.element_ty), e < k)


@triton.jit(do_not_specialize=["N", "k", "images"])
def _mhsc_coo_saet_bwd_kernel(
    d_out_ptr, values_ptr, rows_ptr, cols_ptr, partial_ptr, N, k, H, J, K, d, images, blocks_d,
    d_out_n, d_out_j, d_out_d,
    BE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program sums BK tokens of one head over `images` images into partial [split, K, D]: entries are spread over
    the tokens by a product with their one-hot columns."""
    split = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BK + tl.arange(0, BK)
    h = (tl.program_id(2) // blocks_d).to(tl.int64)
    c = (tl.program_id(2) % blocks_d) * BD + tl.arange(0, BD)
    channel = h * d + c
    acc = tl.zeros((BK, BD), tl.float32)
    for n in range(split * images, tl.minimum(split * images + images, N)):
        matrix = n * H + h
        for start in range(0, k, BE):
            e = start + tl.arange(0, BE)
            row = _load_index(rows_ptr + matrix * k, e, e < k).to(tl.int64)
            col = _load_index(cols_ptr + matrix * k, e, e < k)
            fits = (e < k) & (row >= 0) & (row < J) & (col >= 0) & (col < K)
            value = tl.load(values_ptr + matrix * k + e, fits, 0.0).to(tl.float32)
            d_out_ptrs = d_out_ptr + n * d_out_n + row[:, None] * d_out_j + channel[None, :] * d_out_d
            d_out = tl.load(d_out_ptrs, fits[:, None] & (c < d)[None, :], 0.0).to(tl.float32)
            one_hot = (token[:, None] == col[None, :]).to(tl.float32)  # [BK, BE]
            acc = tl.dot(one_hot, value[:, None] * d_out, acc, input_precision=PRECISION)
    keep = (token < K)[:, None] & (c < d)[None, :]
    tl.store(partial_ptr + (split * K + token)[:, None] * (H * d) + channel[None, :], acc, keep)


def coo_decode_meta(size: int, k: int) -> dict[str, int]:
    """Blocks for matrices of `size` elements with k entries. A thread writes 64 elements of a small matrix, or 32 where
    each is a store of its own; of one that takes several large blocks 32, as there are more entries to look through."""
    BO = block(size, 128, 8192 if size > 4096 else 2048)
    return {"BE": block(k, 16, 1024), "BO": BO, "num_warps": max(1, BO // (1024 if size > 4096 or size % 4 else 2048))}


def mhsc_coo_meta(J: int, d: int, k: int) -> dict[str, int]:
    """Blocks for J tokens, heads of width d and k entries: 16 results a thread, or 8 where addresses take registers."""
    BD = block(d, 16, 128)
    return {"BE": block(k, 16, 1024), "BJ": block(J, 2, (1024 if d % 16 else 2048) // BD), "BD": BD,
            "STEPS": k.bit_length(), "num_warps": 4}  # fmt: skip


def mhsc_coo_values_meta(d: int, k: int) -> dict[str, int]:
    """Blocks of the gradient of the values."""
    BD = block(d, 16, 64)
    return {"BE": block(k, 16, 2048 // BD), "BD": BD, "num_warps": 4}


def mhsc_coo_saet_meta(K: int, d: int, k: int) -> dict[str, int]:
    """Blocks of the gradient of the tokens."""
    return {"BE": block(k, 16, 32), "BK": block(K, 16, 64), "BD": block(d, 16, 64),
            "num_warps": 8 if d % 16 else 4, "num_stages": 2}  # fmt: skip


SPLIT_PROGRAMS = 1024
"""Programs that share the images in the gradient of the tokens; fixed, so that the sums have one order everywhere."""


def _plain(index: Tensor) -> Tensor:
    """Indices in memory order, of at most 32 bits; what a wider one cannot say stays out of range."""
    narrow = index.clamp(-1, 2**31 - 1).to(torch.int32) if index.dtype == torch.int64 else index
    return narrow.contiguous()


def _flag(values: Tensor, check: bool) -> Tensor | None:
    return torch.zeros(1, device=values.device, dtype=torch.int32) if check else None


def coo_decode_fwd(
    values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    """values and integer rows, cols [N, H, k], any strides -> (dense [N, H, J, K], flag int32 [1]: 1 where an index is
    out of range, whose entry is left out)."""
    N, H, k = values.shape
    dense = torch.empty(N, H, J, K, device=values.device, dtype=values.dtype)
    bad = _flag(values, check)
    if N * H * max(J * K, k) == 0:
        return dense, bad
    meta = coo_decode_meta(J * K, k)
    tiles = max(1, triton.cdiv(J * K, meta["BO"]))
    with on_device_of(values):
        _coo_decode_fwd_kernel[(N * H * tiles,)](
            values.contiguous(), _plain(rows), _plain(cols), dense, bad, k, J, K, tiles, **meta
        )
    return dense, bad


def coo_decode_bwd(d_dense: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """d_dense [N, H, J, K], any strides -> d_values [N, H, k]; zero where an index is out of range."""
    N, H, k = rows.shape
    J, K = d_dense.shape[2:]
    d_values = torch.empty(N, H, k, device=d_dense.device, dtype=d_dense.dtype)
    if d_values.numel() == 0:
        return d_values
    BE = block(k, 16, 256)
    blocks = triton.cdiv(k, BE)
    with on_device_of(d_dense):
        _coo_decode_bwd_kernel[(N * H * blocks,)](
            d_dense, _plain(rows), _plain(cols), d_values, k, H, J, K, blocks, *d_dense.stride(), BE=BE, num_warps=2
        )
    return d_values


def mhsc_coo_fwd(
    values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    """values and integer rows, cols [N, H, k], saet [K, D], any strides -> (tokens [N, J, D] of the values' dtype,
    flag int32 [1]: 1 where an index is out of range, whose entry is left out)."""
    N, H, k = values.shape
    K, D = saet.shape
    out = torch.empty(N, J, D, device=values.device, dtype=values.dtype)
    bad = _flag(values, check)
    if N * H * max(J * D, k) == 0:
        return out, bad
    meta = mhsc_coo_meta(J, D // H, k)
    grid = (N * H, max(1, triton.cdiv(J, meta["BJ"])), max(1, triton.cdiv(D // H, meta["BD"])))
    with on_device_of(values):
        _mhsc_coo_fwd_kernel[grid](
            values.contiguous(), _plain(rows), _plain(cols), saet, out, bad, k, H, J, K, D // H, *saet.stride(), **meta
        )
    return out, bad


def mhsc_coo_bwd(
    d_out: Tensor, values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor,
    need_values: bool = True, need_saet: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `mhsc_coo_fwd` for d_out [N, J, D]: (d_values [N, H, k], d_saet [K, D]), None where not needed."""
    N, H, k = values.shape
    (K, D), J = saet.shape, d_out.shape[1]
    d = D // H
    d_values = torch.zeros(N, H, k, device=values.device, dtype=values.dtype) if need_values else None
    d_saet = torch.zeros(K, D, device=saet.device, dtype=saet.dtype) if need_saet else None
    if N * J * k * K * D == 0:
        return d_values, d_saet
    rows, cols = _plain(rows), _plain(cols)
    with on_device_of(values):
        if need_values:
            meta = mhsc_coo_values_meta(d, k)
            blocks = triton.cdiv(k, meta["BE"])
            _mhsc_coo_values_bwd_kernel[(N * H * blocks,)](
                d_out, rows, cols, saet, d_values, k, H, J, K, d, blocks, *d_out.stride(), *saet.stride(), **meta
            )
        if need_saet:
            meta = mhsc_coo_saet_meta(K, d, k)
            blocks_d, blocks_k = triton.cdiv(d, meta["BD"]), triton.cdiv(K, meta["BK"])
            images = triton.cdiv(N, max(1, SPLIT_PROGRAMS // (blocks_k * blocks_d * H)))
            partial = torch.empty(triton.cdiv(N, images), K, D, device=saet.device, dtype=torch.float32)
            precision = dot_precision(values.dtype) if values.dtype == torch.float32 else "tf32"
            _mhsc_coo_saet_bwd_kernel[(len(partial), blocks_k, H * blocks_d)](
                d_out, values.contiguous(), rows, cols, partial, N, k, H, J, K, d, images, blocks_d,
                *d_out.stride(), PRECISION=precision, **meta,
            )  # fmt: skip
            d_saet = sum_rows(partial.view(len(partial), -1), saet.dtype, (K, D))[0]
    return d_values, d_saet
