"""Pieces of kernels that several ops share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a_ptr, a_row, a_col, row, in_row, w_ptr, w_out, w_in, out, in_out, D, BK: tl.constexpr, acc,
             PRECISION: tl.constexpr):  # fmt: skip
    """acc [BM, BN] + a[row, :] . w[out, :], over the D columns of a and w."""
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + row[:, None] * a_row
    w_ptrs = w_ptr + out[:, None] * w_out
    for start in range(0, D, BK):
        ks = (start + k).to(tl.int64)
        a = tl.load(a_ptrs + ks[None, :] * a_col, in_row[:, None] & (ks < D)[None, :], 0.0)  # [BM, BK]
        w = tl.load(w_ptrs + ks[None, :] * w_in, in_out[:, None] & (ks < D)[None, :], 0.0)  # [BN, BK]
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def image_and_token(first, J, BM: tl.constexpr, WHOLE: tl.constexpr):
    """Image n and place j of the tokens n J + j from the `first` on, an int64: [BM] each, or n alone where J is a
    multiple of BM (WHOLE). A division of 64 bits takes some hundred instructions; here it is one a block, not a token.
    """
    n, j = first // J, (first % J).to(tl.int32) + tl.arange(0, BM)
    if not WHOLE:
        n, j = n + j // J, j % J
    return n, j


@triton.jit
def load_row(ptr, col, in_col):
    """A vector of D values as [1, BD] float32, zero beyond D."""
    return tl.load(ptr + col, in_col, 0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(ptr, ld, row, in_row, col, in_col):
    """A tile [BM, BN] of rows that are ld values apart, zero where there is none."""
    return tl.load(ptr + row[:, None] * ld + col[None, :], in_row[:, None] & in_col[None, :], 0.0)


@triton.jit
def store_tile(ptr, ld, row, in_row, col, in_col, x):
    tl.store(ptr + row[:, None] * ld + col[None, :], x, in_row[:, None] & in_col[None, :])


@triton.jit
def add_sum(sums_ptr, col, in_col, x, there):
    """Write the sum of x over its rows, in the columns before `there` added to what is there."""
    tl.store(sums_ptr + col, tl.load(sums_ptr + col, col < there, 0.0) + tl.sum(x, 0), in_col)


@triton.jit
def as_operand(x, keep, dtype: tl.constexpr):
    """x in `dtype`, for a product whose other operand is zero where not `keep`. What stands there, of no meaning, may
    be infinite in float16, and zero times that is no number."""
    if dtype == tl.float16:
        x = tl.where(keep, x, 0.0)
    return x.to(dtype)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
