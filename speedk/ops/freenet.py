"""The decoder: the Feature-Recurrent Network of Eq. 4."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native, registered
from speedk.ops.coo import fits_mhsc_coo, mhsc_coo
from speedk.ops.coo import why_not_triton as why_not_mhsc_coo
from speedk.ops.freenet_block import NORMS, BlockWeights, fits_block, freenet_block, freenet_block_reference
from speedk.ops.freenet_block import why_not_triton as why_not_block
from speedk.ops.mhsc import fits_mhsc, mhsc
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
    norm: str = "branch"


@dispatch.public
def freenet(scm: Tensor, saet: Tensor, weights: FReeNetWeights) -> Tensor:
    """Decode codes to images: Eq. 2, with E A computed once for all blocks.

    Differentiable once in scm, saet and weights (any number of times on the torch backend).

    scm: [N, H, J, K]; saet: [K, D]. Returns [N, C, H, W], in the space the data were normalised to (not [0, 1]).
    Raises ValueError where shapes or dtypes do not fit.
    Backends: Triton, native (CPU, float32: all blocks in one pass over the tokens), torch.
    """
    fits_mhsc(scm, saet)
    _fits_weights(scm.shape[2], saet, weights)
    backend = _op.choose(saet, weights, scm)
    return _decode(mhsc(scm, saet), weights, backend)


@dispatch.public
def freenet_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, weights: FReeNetWeights, *,
                check: bool | None = None) -> Tensor:
    """`freenet` from stored entries ([N, H, k] each): the artifact's path, with no dense code matrix of its own.

    `check` and errors as for `mhsc_coo`, the rest as for `freenet`.
    """
    fits_mhsc_coo(values, rows, cols, saet, weights.patches)
    _fits_weights(weights.patches, saet, weights)
    backend = _coo.choose(saet, weights, values, rows, cols)
    return _decode(mhsc_coo(values, rows, cols, saet, weights.patches, check=check), weights, backend)


def _decode(features: Tensor, weights: FReeNetWeights, backend: str) -> Tensor:
    if backend == "native":
        tensors = [tensor for block in weights.blocks for tensor in block] + [weights.weight, weights.bias]
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (features, *tensors))
        return _freenet(features, tensors, weights.channels, weights.patch, weights.norm == "sum", keep)[0]
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


def _fits(features: Tensor, tensors: list[Tensor], channels: int, patch: int) -> None:
    """The same for the registered op, whose `tensors` are ten of each block and the final two."""
    if features.ndim != 3 or len(tensors) % 10 != 2:
        raise ValueError(f"features must be [N, J, D] and weights ten of each block and two, got "
                         f"{tuple(features.shape)} and {len(tensors)}")
    for start in range(0, len(tensors) - 2, 10):
        fits_block(tensors[start:start + 10], features=features)
    _fits_last(features.shape[1], *tensors[-2:], channels, patch, features=features)


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


@registered.custom_op("speedk::freenet")
def _freenet(features: Tensor, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
             keep: bool) -> tuple[Tensor, Tensor]:
    _fits(features, weights, channels, patch)
    return native.decode_fwd(features, weights, channels, patch, sum_norm, keep)


@_freenet.register_fake
def _(features: Tensor, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
      keep: bool) -> tuple[Tensor, Tensor]:
    n, j, _ = features.shape
    side = square_side(j) * patch
    return features.new_empty(n, channels, side, side), features.new_empty(_kept(features, weights) if keep else 0)


def _kept(features: Tensor, weights: list[Tensor]) -> int:
    """How many values the way back needs; the kernel says the same."""
    n, j, d = features.shape
    return len(weights) // len(BlockWeights._fields) * n * j * (2 * d + 2)


@registered.custom_op("speedk::freenet_bwd")
def _freenet_bwd(d_images: Tensor, kept: Tensor, features: Tensor, weights: list[Tensor], channels: int, patch: int,
                 sum_norm: bool) -> tuple[Tensor, Tensor]:
    _fits(features, weights, channels, patch)
    n, j, _ = features.shape
    side = square_side(j) * patch
    arguments.shaped("d_images", d_images, (n, channels, side, side))
    arguments.shaped("kept", kept, (_kept(features, weights),))
    arguments.alike(features=features, d_images=d_images, kept=kept)
    return native.decode_bwd(d_images, kept, features, weights, channels, patch, sum_norm)


@_freenet_bwd.register_fake
def _(d_images: Tensor, kept: Tensor, features: Tensor, weights: list[Tensor], channels: int, patch: int,
      sum_norm: bool) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), features.new_empty(sum(w.numel() for w in weights))


def _save(ctx, inputs, output) -> None:
    features, weights, *ctx.settings, keep = inputs
    if not keep:
        raise ValueError("freenet has to be called with keep=True where gradients follow")
    ctx.save_for_backward(output[1], features, *weights)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_images: Tensor, _: None):
    kept, features, *weights = ctx.saved_tensors
    if dispatch.batched(d_images):
        reference = functools.partial(_freenet_reference, *ctx.settings)
        d_features, *d_weights = dispatch.gradients_in_torch(reference, [features, *weights], d_images)
        return d_features, d_weights, None, None, None, None
    d_features, d_weights = _freenet_bwd(d_images, kept, features, weights, *ctx.settings)
    # Copies: a view would keep the gradients of all weights alive, in memory and in a file that one is saved to.
    pieces = torch.split_with_sizes_copy(d_weights, [w.numel() for w in weights])
    return d_features, [piece.view(w.shape) for piece, w in zip(pieces, weights)], None, None, None, None


def _freenet_reference(channels: int, patch: int, sum_norm: bool, features: Tensor, *weights: Tensor) -> Tensor:
    state = None
    for start in range(0, len(weights) - 2, 10):
        block = BlockWeights(*weights[start:start + 10])
        state = freenet_block_reference(features, state, block, "sum" if sum_norm else "branch")
    return tokens_to_images_reference(state, *weights[-2:], channels, patch)


_freenet.register_autograd(_backward, setup_context=_save)
