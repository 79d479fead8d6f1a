"""The decoder: the Feature-Recurrent Network of Eq. 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native
from speedk.ops.coo import mhsc_coo
from speedk.ops.freenet_block import MATRICES, NORMS, BlockWeights, freenet_block
from speedk.ops.mhsc import mhsc
from speedk.ops.patches import patch_length, square_side, tokens_to_images


class FReeNetWeights(NamedTuple):
    """Everything of FReeNet but its tokens and codes."""

    blocks: tuple[BlockWeights, ...]
    weight: Tensor  # [L, D], the final linear
    bias: Tensor  # [L]
    channels: int  # C
    patch: int  # side of a patch, in pixels
    patches: int  # J
    norm: str = "branch"


def freenet(scm: Tensor, saet: Tensor, weights: FReeNetWeights) -> Tensor:
    """Decode codes to images: Eq. 2, with E A computed once for all blocks.

    Differentiable once in scm, saet and weights (any number of times on the torch backend).

    scm: [N, H, J, K]; saet: [K, D]. Returns [N, C, H, W], in the space the data were normalised to (not [0, 1]).
    Raises ValueError where shapes or dtypes do not fit.
    Backends: Triton, native (CPU, float32: all blocks in one pass over the tokens), torch.
    """
    return _decode(mhsc(scm, saet), weights)


def freenet_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, weights: FReeNetWeights, *,
                check: bool | None = None) -> Tensor:
    """`freenet` from stored entries ([N, H, k] each): the artifact's path, with no dense code matrix of its own.

    `check` and errors as for `mhsc_coo`, the rest as for `freenet`.
    """
    return _decode(mhsc_coo(values, rows, cols, saet, weights.patches, check=check), weights)


def _decode(features: Tensor, weights: FReeNetWeights) -> Tensor:
    if not weights.blocks:
        raise ValueError("FReeNet needs at least one block")
    if weights.norm not in NORMS:
        raise ValueError(f"norm={weights.norm!r} is not one of {NORMS}")
    if features.shape[1] != weights.patches:
        raise ValueError(f"the codes have J={features.shape[1]} patches but the weights are for {weights.patches}")
    tensors = [tensor for block in weights.blocks for tensor in block] + [weights.weight, weights.bias]
    fits_decoder(features, tensors, weights.channels, weights.patch)
    if _op.choose(features, *tensors) == "native":
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (features, *tensors))
        return _freenet(features, tensors, weights.channels, weights.patch, weights.norm == "sum", keep)[0]
    state = None
    for block in weights.blocks:
        state = freenet_block(features, state, block, weights.norm)
    return tokens_to_images(state, weights.weight, weights.bias, weights.channels, weights.patch)


NAMES = (*BlockWeights._fields, "weight", "bias")


def fits_decoder(features: Tensor, tensors: list[Tensor], channels: int, patch: int) -> None:
    """Raise ValueError unless features [N, J, D] go through `tensors`, ten of each block and the final two."""
    if features.ndim != 3 or len(tensors) % 10 != 2:
        raise ValueError(f"features must be [N, J, D] and weights ten of each block and two, got "
                         f"{tuple(features.shape)} and {len(tensors)}")
    square_side(features.shape[1])
    D, L = features.shape[2], patch_length(channels, patch)
    shapes = [(D, D) if name in MATRICES else (D,) for name in BlockWeights._fields] * (len(tensors) // 10)
    for i, (tensor, shape) in enumerate(zip(tensors, [*shapes, (L, D), (L,)], strict=True)):
        name = NAMES[i % 10 if i < len(tensors) - 2 else i - len(tensors)]
        if tensor.shape != shape:
            raise ValueError(f"{name} for D={D} and L={L} must be {shape}, got {tuple(tensor.shape)}")
        arguments.alike(features=features, **{name: tensor})


def why_not_native(*tensors: Tensor) -> str | None:
    if tensors[0].dtype != torch.float32:
        return f"{tensors[0].dtype} is computed in PyTorch"
    if len(tensors) > 10 * 64 + 3:
        return "more than 64 blocks are computed in PyTorch"
    return dispatch.why_not_native_cpu(*tensors)


# Triton's decoder is the composition of its ops below, each with a choice of its own.
_op = dispatch.Op("freenet", triton=dispatch.why_not_triton, native=why_not_native)


@torch.library.custom_op("speedk::freenet", mutates_args=())
def _freenet(features: Tensor, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
             keep: bool) -> tuple[Tensor, Tensor]:
    fits_decoder(features, weights, channels, patch)
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
    return len(weights) // 10 * n * j * (2 * d + 2)


@torch.library.custom_op("speedk::freenet_bwd", mutates_args=())
def _freenet_bwd(d_images: Tensor, kept: Tensor, features: Tensor, weights: list[Tensor], channels: int, patch: int,
                 sum_norm: bool) -> tuple[Tensor, Tensor]:
    fits_decoder(features, weights, channels, patch)
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
    d_features, d_weights = _freenet_bwd(d_images, kept, features, weights, *ctx.settings)
    pieces = d_weights.split([w.numel() for w in weights])
    return d_features, [piece.view(w.shape) for piece, w in zip(pieces, weights)], None, None, None, None


_freenet.register_autograd(_backward, setup_context=_save)
