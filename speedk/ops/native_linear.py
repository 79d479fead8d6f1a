"""Launcher of the CUDA kernel of the way back through codes times SAETs (Eq. 3) and through the last linear, where
their forward passes are Triton's: float32, both gradients in one pass over the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speedk.ops import dispatch
from speedk.ops.dispatch import native
from speedk.ops.native import launch
from speedk.precision import tf32_allowed

MULTIPROCESSORS = 132
"""Those of an H100 that programs share the tokens for, or fewer, so that their sums take no more memory than the
inputs. Fixed, so that the sums have one order everywhere."""

HEADS, SLICE = (32, 48, 64), 64  # widths D / H of a head, and what K is a multiple of
PATCH, VALUES, COLUMNS = 4, 48, 48  # a patch's side and its values, and what D is a multiple of
TOKENS = 16  # what J is a multiple of


def _missing(*tensors: Tensor) -> str | None:
    missing = dispatch.why_not_native_cuda(*tensors)
    if missing is not None:
        return missing
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return "the kernel is for float32"
    return _too_old(tensors[0].device.index)


@torch.compiler.assume_constant_result
def _too_old(device: int | None) -> str | None:
    if torch.cuda.get_device_properties(device).major < 8:
        return "it needs a GPU of compute capability 8.0 or later"
    return None


def why_not_mhsc(scm: Tensor, saet: Tensor) -> str | None:
    _, H, J, K = scm.shape
    fits = K and J and K % SLICE == J % TOKENS == 0
    if not fits or saet.shape[1] // H not in HEADS or not scm.is_contiguous():
        return f"there is no kernel for heads of {saet.shape[1] // H}, {J} patches and {K} tokens"
    return _missing(scm, saet)


def why_not_projection(state: Tensor, weight: Tensor, patch: int) -> str | None:
    _, J, D = state.shape
    side = math.isqrt(int(J))
    fits = patch == PATCH and weight.shape[0] == VALUES and D and D % COLUMNS == 0
    if not fits or side < 4 or side & (side - 1) or not state.is_contiguous():
        return f"there is no kernel for patches of {patch}, {J} of them, and D={D}"
    return _missing(state, weight)


def _ready(tensor: Tensor) -> Tensor:
    """`tensor` in memory order, at an address that is a multiple of 16."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _backward(inputs: Tensor, weight: Tensor, d_tokens: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...],
              image: tuple[int, int], wanted: tuple[bool, bool], slices: int, bias: int) -> tuple[Tensor | None, ...]:
    """d_inputs, and the gradients of the weight and, behind it, of so many biases, flat; None where not wanted.
    `sizes`: images, parts, J, K, W; `strides`: of a part, of k, of a column; `image`: channels and side."""
    d_inputs = torch.empty_like(inputs) if wanted[0] else None
    size, tokens = weight.numel() + bias, sizes[0] * sizes[2]
    programs = MULTIPROCESSORS * native().linear_programs(sizes[4], tf32_allowed())
    splits = max(1, min(programs // slices, tokens // TOKENS, inputs.numel() // size))
    partial = torch.empty(splits, size, dtype=torch.float32, device=inputs.device) if wanted[1] else None
    job = native().LinearBackward(tf32_allowed(), *sizes, inputs.data_ptr(), weight.data_ptr(), *strides,
                                  d_tokens.data_ptr(), *image)  # fmt: skip
    launch("linear_backward", job, inputs, d_inputs, partial, numbers=(size, splits))
    if partial is None:
        return d_inputs, None
    total = torch.empty(size, dtype=torch.float32, device=inputs.device)
    launch("sum_rows", 0, partial, total, numbers=(splits, size))
    return d_inputs, total


def mhsc_bwd(d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool, need_saet: bool):
    """d_scm [N, H, J, K] and d_saet [K, D] for d_out [N, J, D]; None where not needed."""
    (N, H, J, K), D = scm.shape, saet.shape[1]
    if N == 0 or not (need_scm or need_saet):
        return scm.new_zeros(scm.shape) if need_scm else None, saet.new_zeros(K, D) if need_saet else None
    d_scm, d_saet = _backward(_ready(scm), _ready(saet), _ready(d_out), (N, H, J, K, D // H), (D // H, D, 1), (0, 0),
                              (need_scm, need_saet), H * (K // SLICE), 0)  # fmt: skip
    return d_scm, None if d_saet is None else d_saet.view(K, D)


def tokens_to_images_bwd(d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool = True,
                         need_weight: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_state [N, J, D], d_weight [L, D] and d_bias [L] for d_images [N, C, H, W]; None where not needed."""
    (N, J, D), L = state.shape, len(weight)
    if N == 0 or not (need_state or need_weight):
        return (state.new_zeros(N, J, D) if need_state else None,
                *((weight.new_zeros(L, D), weight.new_zeros(L)) if need_weight else (None, None)))  # fmt: skip
    image = d_images.shape[1], math.isqrt(J)
    d_state, found = _backward(_ready(state), _ready(weight), _ready(d_images), (N, 1, J, D, L), (0, 1, D), image,
                               (need_state, need_weight), D // COLUMNS, L)  # fmt: skip
    return (d_state, None, None) if found is None else (d_state, found[:-L].view(L, D), found[-L:])
