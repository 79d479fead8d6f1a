"""The decoder: the Feature-Recurrent Network of Eq. 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from speedk.ops import dispatch, native
from speedk.ops.coo import mhsc_coo
from speedk.ops.freenet_block import NORMS, BlockWeights, freenet_block
from speedk.ops.mhsc import mhsc
from speedk.ops.patches import tokens_to_images


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
    _fit(features, tensors, weights)
    if _op.choose(features, *tensors) == "native":
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (features, *tensors))
        return _freenet(features, tensors, weights.channels, weights.patch, weights.norm == "sum", keep)[0]
    state = None
    for block in weights.blocks:
        state = freenet_block(features, state, block, weights.norm)
    return tokens_to_images(state, weights.weight, weights.bias, weights.channels, weights.patch)


def _fit(features: Tensor, tensors: list[Tensor], weights: FReeNetWeights) -> None:
    D, L = features.shape[-1], weights.patch**2 * weights.channels
    square, row = (D, D), (D,)
    shapes = [square, row, row, row, square, row, square, row, row, row] * len(weights.blocks) + [(L, D), (L,)]
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"a weight for D={D} and L={L} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != features.dtype:
            raise ValueError(f"the features are {features.dtype} but a weight is {tensor.dtype}")


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
    return native.decode_fwd(features, weights, channels, patch, sum_norm, keep)


@_freenet.register_fake
def _(features: Tensor, weights: list[Tensor], channels: int, patch: int, sum_norm: bool,
      keep: bool) -> tuple[Tensor, Tensor]:
    n, j, d = features.shape
    side = int(j**0.5 + 0.5) * patch
    kept = len(weights) // 10 * n * j * (2 * d + 2) if keep else 0
    return features.new_empty(n, channels, side, side), features.new_empty(kept)


@torch.library.custom_op("speedk::freenet_bwd", mutates_args=())
def _freenet_bwd(d_images: Tensor, kept: Tensor, features: Tensor, weights: list[Tensor], channels: int, patch: int,
                 sum_norm: bool) -> tuple[Tensor, Tensor]:
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
