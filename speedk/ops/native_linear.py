"""Launcher of the CUDA kernel of the way back through codes times SAETs (Eq. 3) and through the last linear, where
their forward passes are Triton's: float32, both gradients in one pass over the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speedk.ops import dispatch
from speedk.ops.dispatch import native
from speedk.ops.native import DTYPES, gpu_lacks, launch, ready
from speedk.precision import tf32_allowed

MULTIPROCESSORS = 132
"""Those of an H100 that programs share the tokens for, or fewer, so that their sums take no more memory than the
inputs. Fixed, so that the sums have one order everywhere."""

HEADS, SLICE = (32, 48, 64), 64  # widths D / H of a head, and what K is a multiple of
COLUMNS = {4: 48, 8: 192}  # by a patch's side, of which L is 3 squares: of so many columns one program takes of D
TOKENS = 16  # what J is a multiple of
MOST_PARTS = 65_535  # of a grid's second dimension
SQUARES = tuple(4**n for n in range(2, 11))  # J of an image in patches, whose side is a power of two


def _missing(inputs: Tensor, weight: Tensor, needed: int) -> str | None:
    """`needed`: bytes of shared memory of one program; a constant, as sizes need not be numbers to `torch.compile`."""
    missing = dispatch.why_not_native_cuda(inputs, weight)
    if missing is not None:
        return missing
    if inputs.dtype != torch.float32:
        return "the kernel is for float32"
    return gpu_lacks(inputs.device.index, needed)


def why_not_mhsc(scm: Tensor, saet: Tensor) -> str | None:
    _, H, J, K = scm.shape
    width = saet.shape[1] // H
    fits = K and J and K % SLICE == J % TOKENS == 0
    if not fits or width not in HEADS or H * (K // SLICE) > MOST_PARTS:
        return f"there is no kernel for {H} heads of {width}, {J} patches and {K} tokens"
    if not scm.is_contiguous():
        return "the codes are not contiguous"
    return _missing(scm, saet, 4 * SLICE * max(HEADS))


def why_not_projection(state: Tensor, weight: Tensor, patch: int) -> str | None:
    (_, J, D), L = state.shape, weight.shape[0]
    columns = COLUMNS.get(patch, 0)
    fits = columns and D and 3 * patch**2 == L and (patch == 4 or columns == D) and D % columns == 0
    if not fits or J not in SQUARES:
        return f"there is no kernel for {J} patches of {L} values and D={D}"
    if not state.is_contiguous():
        return "the tokens are not contiguous"
    return _missing(state, weight, 4 * 192 * 192) if patch == 8 else _missing(state, weight, 4 * 48 * 48)


def _fits(reason: str | None) -> None:
    """Raise ValueError where an op that was called by its registered name has no kernel for what it is given."""
    if reason is not None:
        raise ValueError(f"the native kernel does not take this: {reason}")


def _backward(inputs: Tensor, weight: Tensor, d_tokens: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...],
              image: tuple[int, int], wanted: tuple[bool, bool], slices: int, bias: int) -> tuple[Tensor | None, ...]:
    """d_inputs, and the gradients of the weight, flat, and of so many biases; None where not wanted.
    `sizes`: images, parts, J, K, W; `strides`: of a part, of k, of a column; `image`: the sides of a patch and, in
    patches, of an image."""
    d_inputs = torch.empty_like(inputs) if wanted[0] else None
    size, tokens = weight.numel() + bias, sizes[0] * sizes[2]
    programs = MULTIPROCESSORS * native().linear_programs(sizes[4])
    splits = max(1, min(programs // slices, tokens // TOKENS, inputs.numel() // size))
    partial = torch.empty(splits, size, dtype=torch.float32, device=inputs.device) if wanted[1] else None
    job = native().LinearBackward(tf32_allowed(), *sizes, inputs.data_ptr(), weight.data_ptr(), *strides,
                                  d_tokens.data_ptr(), *image)  # fmt: skip
    launch("linear_backward", job, inputs, d_inputs, partial, numbers=(size, splits))
    if partial is None:
        return d_inputs, None, None
    d_weight, d_bias = (torch.empty(n, dtype=torch.float32, device=inputs.device) for n in (weight.numel(), bias))
    launch("sum_rows", DTYPES[torch.float32], partial, d_weight, d_bias, numbers=(splits, size, weight.numel()))
    return d_inputs, d_weight, d_bias


def mhsc_bwd(d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool, need_saet: bool):
    """d_scm [N, H, J, K] and d_saet [K, D] for d_out [N, J, D]; None where not needed."""
    _fits(why_not_mhsc(scm, saet))
    (N, H, J, K), D = scm.shape, saet.shape[1]
    if N == 0 or not (need_scm or need_saet):
        return scm.new_zeros(scm.shape) if need_scm else None, saet.new_zeros(K, D) if need_saet else None
    d_scm, d_saet, _ = _backward(ready(scm), ready(saet), ready(d_out), (N, H, J, K, D // H), (D // H, D, 1),
                                 (0, 0), (need_scm, need_saet), H * (K // SLICE), 0)  # fmt: skip
    return d_scm, None if d_saet is None else d_saet.view(K, D)


def tokens_to_images_bwd(d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool = True,
                         need_weight: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_state [N, J, D], d_weight [L, D] and d_bias [L] for d_images [N, C, H, W]; None where not needed."""
    _fits(why_not_projection(state, weight, patch))
    (N, J, D), L = state.shape, len(weight)
    if N == 0 or not (need_state or need_weight):
        return (state.new_zeros(N, J, D) if need_state else None,
                *((weight.new_zeros(L, D), weight.new_zeros(L)) if need_weight else (None, None)))  # fmt: skip
    image = patch, math.isqrt(J)
    d_state, d_weight, d_bias = _backward(ready(state), ready(weight), ready(d_images), (N, 1, J, D, L), (0, 1, D),
                                          image, (need_state, need_weight), D // COLUMNS[patch], L)  # fmt: skip
    return d_state, None if d_weight is None else d_weight.view(L, D), d_bias
