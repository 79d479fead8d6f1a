"""Multi-head sparse coding: out[n, j, h d + c] = sum_k scm[n, h, j, k] saet[k, h d + c], with d = D / H."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedk.kernels._launch import block, dot_precision, on_device_of
from speedk.kernels._sums import sum_rows
from speedk.kernels._tiles import image_and_token

SPLIT_PROGRAMS = 1024
"""Programs aimed at by the backward kernel, which splits the tokens: 4 to 8 for each multiprocessor of an A100 or H100.
It is fixed, so that the order of the sums does not depend on the device."""


@triton.jit(do_not_specialize=["M"])
def _mhsc_fwd_kernel(
    scm_ptr, saet_ptr, out_ptr, M, J, K, d,
    scm_n, scm_h, scm_j, scm_k, saet_k, saet_d, D,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BM
    m = first + tl.arange(0, BM)  # tokens n J + j
    n, j = image_and_token(first, J, BM, WHOLE)
    h = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    c = tl.arange(0, BD)
    scm_ptrs = scm_ptr + n * scm_n + h * scm_h + j.to(tl.int64) * scm_j
    saet_ptrs = saet_ptr + (h * d + c) * saet_d
    acc = tl.zeros((BM, BD), tl.float32)
    for start in range(0, K, BK):
        ks = (start + k).to(tl.int64)
        codes = tl.load(scm_ptrs[:, None] + ks[None, :] * scm_k, (m < M)[:, None] & (ks < K)[None, :], 0.0)  # [BM, BK]
        pool = tl.load(saet_ptrs[None, :] + ks[:, None] * saet_k, (ks < K)[:, None] & (c < d)[None, :], 0.0)  # [BK, BD]
        acc = tl.dot(codes, pool, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + m[:, None] * D + (h * d + c)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (c < d)[None, :])


@triton.jit(do_not_specialize=["M", "tiles"])
def _mhsc_bwd_kernel(
    d_out_ptr, scm_ptr, saet_ptr, d_scm_ptr, d_saet_ptr, M, J, K, d, H, tiles,
    d_out_n, d_out_j, d_out_d, scm_n, scm_h, scm_j, scm_k, saet_k, saet_d,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr, NEED_SCM: tl.constexpr,
    NEED_SAET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program walks `tiles` blocks of tokens of one head and one block of columns k: it writes their d_scm, and one
    partial sum of d_saet, [split, K, D]."""
    split = tl.program_id(0).to(tl.int64)
    ks = (tl.program_id(1) * BK + tl.arange(0, BK)).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BD)
    channel = h * d + c
    keep_pool = (ks < K)[:, None] & (c < d)[None, :]
    pool = tl.load(saet_ptr + ks[:, None] * saet_k + channel[None, :] * saet_d, keep_pool, 0.0)  # [BK, BD]
    acc = tl.zeros((BK, BD), tl.float32)
    for tile in range(tiles):
        first = (split * tiles + tile) * BM
        m = first + tl.arange(0, BM)
        n, j = image_and_token(first, J, BM, WHOLE)
        j = j.to(tl.int64)
        d_out_ptrs = d_out_ptr + (n * d_out_n + j * d_out_j)[:, None] + channel[None, :] * d_out_d
        d_out = tl.load(d_out_ptrs, (m < M)[:, None] & (c < d)[None, :], 0.0)  # [BM, BD]
        keep = (m < M)[:, None] & (ks < K)[None, :]
        if NEED_SCM:
            d_scm = tl.dot(d_out, tl.trans(pool), input_precision=PRECISION)  # [BM, BK]
            d_scm_ptrs = d_scm_ptr + ((n * H + h) * J + j)[:, None] * K + ks[None, :]
            tl.store(d_scm_ptrs, d_scm.to(d_scm_ptr.dtype.element_ty), keep)
        if NEED_SAET:
            codes = tl.load(scm_ptr + (n * scm_n + h * scm_h + j * scm_j)[:, None] + ks[None, :] * scm_k, keep, 0.0)
            acc = tl.dot(tl.trans(codes), d_out, acc, input_precision=PRECISION)
    if NEED_SAET:
        tl.store(d_saet_ptr + (split * K + ks)[:, None] * (H * d) + channel[None, :], acc, keep_pool)


def mhsc_fwd_meta(K: int, d: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks of the forward kernel for K tokens and heads of width d."""
    BD = block(d)
    if BD > 64:
        return {"BM": 32 if precision == "tf32x3" else 64, "BK": 16, "BD": BD, "num_warps": 8, "num_stages": 2}
    if K % 16 or d % 16:  # no address is a multiple of 16 bytes, and each takes registers of its own
        return {"BM": 64, "BK": block(K, largest=32), "BD": BD, "num_warps": 8, "num_stages": 3}
    if itemsize == 2:
        return {"BM": 64, "BK": block(K, largest=64), "BD": BD, "num_warps": 4, "num_stages": 2}
    tall = precision == "tf32" and BD <= 64
    return {"BM": 256 if tall else 128, "BK": block(K, largest=32), "BD": BD,
            "num_warps": 4 if BD <= 32 and not tall else 8, "num_stages": 3}  # fmt: skip


def mhsc_bwd_meta(K: int, d: int, precision: str, itemsize: int) -> dict[str, int]:
    """Blocks of the backward kernel for K tokens and heads of width d."""
    BD = block(d)
    full, even = itemsize == 4 and precision == "tf32x3", K % 16 == 0 and d % 16 == 0
    if full and BD <= 32 and even:
        return {"BM": 64, "BK": block(K, largest=64), "BD": BD, "num_warps": 4, "num_stages": 1}
    if BD > 64 or full:  # operands in two halves, or this wide: larger blocks spill
        return {"BM": 32 if BD <= 128 else 16, "BK": block(K, largest=32), "BD": BD,
                "num_warps": 8, "num_stages": 1}  # fmt: skip
    if not even:
        return {"BM": 32, "BK": block(K, largest=64), "BD": BD, "num_warps": 8, "num_stages": 2}
    if itemsize == 2:
        return {"BM": 32, "BK": block(K, largest=64), "BD": BD, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BK": block(K, largest=64), "BD": BD, "num_warps": 4, "num_stages": 2}


def mhsc_fwd(scm: Tensor, saet: Tensor) -> Tensor:
    """scm [N, H, J, K] and saet [K, D], any strides, of one dtype -> [N, J, D]; D / H at most 256."""
    N, H, J, K = scm.shape
    D = saet.shape[1]
    out = torch.empty(N, J, D, device=scm.device, dtype=scm.dtype)
    if out.numel() == 0:
        return out
    precision = dot_precision(scm.dtype)
    meta = mhsc_fwd_meta(K, D // H, precision, scm.element_size())
    grid = (triton.cdiv(N * J, meta["BM"]), H)
    with on_device_of(scm):
        _mhsc_fwd_kernel[grid](
            scm, saet, out, N * J, J, K, D // H, *scm.stride(), *saet.stride(), D,
            WHOLE=J % meta["BM"] == 0, PRECISION=precision, **meta,
        )  # fmt: skip
    return out


def mhsc_bwd(
    d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool = True, need_saet: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `mhsc_fwd` for d_out [N, J, D]: (d_scm [N, H, J, K], d_saet [K, D]), None where not needed.

    d_saet sums partial results over a fixed split of the tokens: no atomics, the same bits each time.
    """
    N, H, J, K = scm.shape
    D = saet.shape[1]
    d_scm = torch.empty(N, H, J, K, device=scm.device, dtype=scm.dtype) if need_scm else None
    if N * J * K * D == 0 or not (need_scm or need_saet):
        return d_scm.zero_() if need_scm else None, saet.new_zeros(saet.shape) if need_saet else None
    precision = dot_precision(scm.dtype)
    meta = mhsc_bwd_meta(K, D // H, precision, scm.element_size())
    blocks, columns = triton.cdiv(N * J, meta["BM"]), triton.cdiv(K, meta["BK"])
    tiles = triton.cdiv(blocks, max(1, SPLIT_PROGRAMS // (columns * H)))
    splits = triton.cdiv(blocks, tiles)
    partial = torch.empty(splits, K, D, device=scm.device, dtype=torch.float32) if need_saet else None
    with on_device_of(scm):
        _mhsc_bwd_kernel[(splits, columns, H)](
            d_out, scm, saet, d_scm if need_scm else d_out, partial if need_saet else d_out,
            N * J, J, K, D // H, H, tiles, *d_out.stride(), *scm.stride(), *saet.stride(),
            WHOLE=J % meta["BM"] == 0, NEED_SCM=need_scm, NEED_SAET=need_saet,
            PRECISION=precision, **meta,
        )  # fmt: skip
    return d_scm, sum_rows(partial.view(splits, -1), saet.dtype, (K, D))[0] if need_saet else None
