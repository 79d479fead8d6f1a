"""The decoder: the Feature-Recurrent Network of Eq. 4."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native, registered
from speedk.ops.coo import fits_mhsc_coo, mhsc_coo
from speedk.ops.coo import why_not_triton as why_not_mhsc_coo
from speedk.ops.freenet_block import NORMS, PER_BLOCK, BlockWeights, fits_block, freenet_block, freenet_block_reference
from speedk.ops.freenet_block import why_not_triton as why_not_block
from speedk.ops.mhsc import fits_mhsc, mhsc, mhsc_reference
from speedk.ops.mhsc import why_not_triton as why_not_mhsc
from speedk.ops.patches import patch_length, square_side, tokens_to_images, tokens_to_images_reference
from speedk.ops.patches import why_not_triton_product as why_not_product


class FReeNetWeights(NamedTuple):
    """Everything of FReeNet but its tokens and codes."""

    blocks: tuple[BlockWeights, ...]
    weight: Tensor  # [L, D], the final linear
    bias: Tensor  # [L]
    channels: int  # C
    patch: int  # side of a patch, in pixels
    patches: int  # J
    norm: str = "branch"  # where a block adds its state, as in `freenet_block`


@dispatch.public
def freenet(scm: Tensor, saet: Tensor, weights: FReeNetWeights) -> Tensor:
    """Decode codes to images: Eq. 2, with E A computed once for all blocks.

    Differentiable once in scm, saet and weights (any number of times on the torch backend).

    scm: [N, H, J, K] floating; saet: [K, D], D a multiple of H; weights: as `speedk.FReeNet.weights()` gives them; all
    of one dtype, on one device, any strides. Returns [N, C, H, W] of that dtype, H = W = patch * sqrt(J), in the space
    the data were normalised to (not [0, 1]).
    Raises ValueError where shapes, dtypes or devices do not fit, or J is not a square number.
    Backends: Triton (as a composition of ops, of which `freenet_block` may have a CUDA kernel), native (CPU, float32:
    codes, blocks and projection in one pass over the tokens), torch.
    """
    fits_mhsc(scm, saet)
    _fits_weights(scm.shape[2], saet, weights)
    if _op.choose(saet, weights, scm) == "native":
        return _natively(scm, saet, weights)
    return _decode(mhsc(scm, saet), weights)


@dispatch.public
def freenet_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, weights: FReeNetWeights, *,
                check: bool | None = None) -> Tensor:
    """`freenet` from stored entries: the artifact's path, with no dense code matrix of its own.

    Differentiable once in values, saet and weights (any number of times on the torch backend).

    values: [N, H, k] floating; rows, cols: [N, H, k] of an integer dtype, below J and below K; saet: [K, D] and weights
    as for `freenet`. check: whether an index out of range is looked for, as for `coo_decode`.
    Returns [N, C, H, W], as `freenet` does.
    Raises ValueError where shapes, dtypes or devices do not fit, J is not a square number or, where checked, an index
    is out of range.
    Backends: Triton (as a composition of ops), native (CPU, float32: `mhsc_coo`, then the rest in one pass), torch.
    """
    fits_mhsc_coo(values, rows, cols, saet, weights.patches)
    _fits_weights(weights.patches, saet, weights)
    backend = _coo.choose(saet, weights, values, rows, cols)
    features = mhsc_coo(values, rows, cols, saet, weights.patches, check=check)
    return _natively(features, None, weights) if backend == "native" else _decode(features, weights)


def _natively(inputs: Tensor, saet: Tensor | None, weights: FReeNetWeights) -> Tensor:
    tensors = [tensor for block in weights.blocks for tensor in block] + [weights.weight, weights.bias]
    learned = torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, *_given(saet), *tensors))
    # A matrix unit, and vectors in one narrow block, find all of it again sooner than as much memory is handed out.
    wide = weights.weight.shape[1] >= NATIVE_LEAST_FOR_UNIT
    keep = learned and not (native.matrix_unit() if wide else len(weights.blocks) == 1)
    return _freenet(inputs, saet, tensors, weights.channels, weights.patch, weights.norm == "sum", keep)[0]


def _decode(features: Tensor, weights: FReeNetWeights) -> Tensor:
    state = None
    for block in weights.blocks:
        state = freenet_block(features, state, block, weights.norm)
    return tokens_to_images(state, weights.weight, weights.bias, weights.channels, weights.patch)


def _fits_weights(J: int, saet: Tensor, weights: FReeNetWeights) -> None:
    if not weights.blocks:
        raise ValueError("FReeNet needs at least one block")
    if weights.norm not in NORMS:
        raise ValueError(f"norm={weights.norm!r} is not one of {NORMS}")
    if weights.patches != J:
        raise ValueError(f"the codes have J={J} patches but the weights are for {weights.patches}")
    for block in weights.blocks:
        fits_block(block, saet=saet)
    _fits_last(J, weights.weight, weights.bias, weights.channels, weights.patch, saet=saet)


def _fits(inputs: Tensor, saet: Tensor | None, tensors: list[Tensor], channels: int, patch: int) -> None:
    """The same for the registered op, whose `tensors` are ten of each block and the final two."""
    if saet is None and inputs.ndim != 3:
        raise ValueError(f"without SAETs the inputs must be features [N, J, D], got {tuple(inputs.shape)}")
    if saet is not None:
        fits_mhsc(inputs, saet)
    if len(tensors) % PER_BLOCK != 2:
        raise ValueError(f"weights must be {PER_BLOCK} of each block and two, got {len(tensors)}")
    tokens = {"features": inputs} if saet is None else {"saet": saet}
    for start in range(0, len(tensors) - 2, PER_BLOCK):
        fits_block(tensors[start:start + PER_BLOCK], **tokens)
    _fits_last(inputs.shape[-2], *tensors[-2:], channels, patch, **tokens)


def _fits_last(J: int, weight: Tensor, bias: Tensor, channels: int, patch: int, **tokens: Tensor) -> None:
    ((name, first),) = tokens.items()
    square_side(J)
    D, L = first.shape[-1], patch_length(channels, patch)
    if weight.shape != (L, D) or bias.shape != (L,):
        raise ValueError(f"for {channels} channels and patch={patch} the last weight must be {(L, D)} and bias {(L,)}, "
                         f"got {tuple(weight.shape)} and {tuple(bias.shape)}")
    arguments.alike(**{name: first}, weight=weight, bias=bias)


NATIVE_BLOCKS = 64
"""Blocks of a decoder that the native kernel takes."""

NATIVE_LEAST_FOR_UNIT = 64
"""D from which on the native kernel takes its products to a matrix unit, where there is one."""


def why_not_native(saet: Tensor, weights: FReeNetWeights, *codes: Tensor) -> str | None:
    if saet.dtype != torch.float32:
        return f"{saet.dtype} is computed in PyTorch"
    if len(weights.blocks) > NATIVE_BLOCKS:
        return f"more than {NATIVE_BLOCKS} blocks are computed in PyTorch"
    return dispatch.why_not_native_cpu(saet)


def why_not_triton(saet: Tensor, weights: FReeNetWeights, *codes: Tensor) -> str | None:
    """Triton's decoder is the composition of its ops, each with a choice of its own."""
    return ((why_not_mhsc if len(codes) == 1 else why_not_mhsc_coo)(*codes, saet)
            or why_not_block(saet, None, weights.blocks[0])
            or why_not_product(saet, weights.weight, weights.bias, weights.channels, weights.patch))


_op = dispatch.Op("freenet", triton=why_not_triton, native=why_not_native)
_coo = dispatch.Op("freenet_coo", triton=why_not_triton, native=why_not_native)


def _fits_forward(inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int, patch: int,
                  *_: bool) -> None:
    _fits(inputs, saet, weights, channels, patch)


@registered.custom_op("speedk::freenet", fits=_fits_forward)
def _freenet(inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
             keep: bool) -> tuple[Tensor, Tensor]:
    """The images from codes [N, H, J, K] and SAETs, or from the features [N, J, D] that they make, and None; and what
    the way back need not find once more."""
    return native.decode_fwd(inputs, saet, weights, channels, patch, sum_norm, keep)


@_freenet.register_fake
def _(inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
      keep: bool) -> tuple[Tensor, Tensor]:
    side = square_side(inputs.shape[-2]) * patch
    return (inputs.new_empty(inputs.shape[0], channels, side, side),
            inputs.new_empty(_kept(inputs, saet, weights) if keep else 0))


def _kept(inputs: Tensor, saet: Tensor | None, weights: list[Tensor]) -> int:
    """How many values are kept for the way back; the kernel says the same."""
    tokens = inputs.shape[0] * inputs.shape[-2]
    d = inputs.shape[-1] if saet is None else saet.shape[1]
    return tokens * (len(weights) // PER_BLOCK * (2 * d + 2) + (0 if saet is None else d))


@registered.custom_op("speedk::freenet_bwd")
def _freenet_bwd(d_images: Tensor, kept: Tensor, inputs: Tensor, saet: Tensor | None, weights: list[Tensor],
                 channels: int, patch: int, sum_norm: bool, need_inputs: bool,
                 need_saet: bool) -> tuple[Tensor, list[Tensor]]:
    _fits(inputs, saet, weights, channels, patch)
    side = square_side(inputs.shape[-2]) * patch
    arguments.shaped("d_images", d_images, (inputs.shape[0], channels, side, side))
    if kept.numel():
        arguments.shaped("kept", kept, (_kept(inputs, saet, weights),))
    arguments.alike(inputs=inputs, d_images=d_images, kept=kept)
    d_inputs, d_weights = native.decode_bwd(d_images, kept, inputs, saet, weights, channels, patch, sum_norm,
                                            need_inputs, need_saet)  # fmt: skip
    return inputs.new_empty(0) if d_inputs is None else d_inputs, d_weights


@_freenet_bwd.register_fake
def _(d_images: Tensor, kept: Tensor, inputs: Tensor, saet: Tensor | None, weights: list[Tensor], channels: int,
      patch: int, sum_norm: bool, need_inputs: bool, need_saet: bool) -> tuple[Tensor, list[Tensor]]:
    return (inputs.new_empty(inputs.shape if need_inputs else 0),
            [t.new_empty(t.shape) for t in [*weights, *_given(saet)]])


def _given(saet: Tensor | None) -> list[Tensor]:
    return [] if saet is None else [saet]


def _save(ctx, inputs, output) -> None:
    first, saet, weights, *ctx.settings, _ = inputs
    ctx.coded = saet is not None
    # Not needs_input_grad, which on the short way (`registered`) counts what is in a list one by one.
    ctx.needs = first.requires_grad, ctx.coded and saet.requires_grad
    ctx.save_for_backward(output[1], first, *weights, *_given(saet))
    ctx.set_materialize_grads(False)


def _backward(ctx, d_images: Tensor, _: None):
    kept, inputs, *tensors = ctx.saved_tensors
    weights, saet = (tensors[:-1], tensors[-1]) if ctx.coded else (tensors, None)
    if dispatch.batched(d_images):
        reference = functools.partial(_freenet_reference, ctx.coded, *ctx.settings)
        d_inputs, *pieces = dispatch.gradients_in_torch(reference, [inputs, *tensors], d_images)
    else:
        d_inputs, pieces = _freenet_bwd(d_images, kept, inputs, saet, weights, *ctx.settings, *ctx.needs)
        d_inputs = d_inputs if ctx.needs[0] else None
    d_saet = pieces.pop() if ctx.coded else None
    return d_inputs, d_saet, pieces, None, None, None, None


def _freenet_reference(coded: bool, channels: int, patch: int, sum_norm: bool, inputs: Tensor,
                       *tensors: Tensor) -> Tensor:
    weights = tensors[:-1] if coded else tensors
    features = mhsc_reference(inputs, tensors[-1]) if coded else inputs
    state = None
    for start in range(0, len(weights) - 2, PER_BLOCK):
        block = BlockWeights(*weights[start:start + PER_BLOCK])
        state = freenet_block_reference(features, state, block, "sum" if sum_norm else "branch")
    return tokens_to_images_reference(state, *weights[-2:], channels, patch)


_freenet.register_autograd(_backward, setup_context=_save)
_freenet_bwd.ends("freenet")
