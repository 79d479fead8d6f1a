"""The decoder: the Feature-Recurrent Network of Eq. 4."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import gelu, linear

from speedk.ops.add_layer_norm import add_layer_norm
from speedk.ops.coo import mhsc_coo
from speedk.ops.mhsc import mhsc
from speedk.ops.patches import tokens_to_images

EPS = 1e-6
NORMS = ("branch", "sum")


class BlockWeights(NamedTuple):
    """The 3 D^2 + 7 D parameters of one recurrent block."""

    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor  # [D]
    norm1_weight: Tensor  # [D]
    norm1_bias: Tensor  # [D]
    fc1_weight: Tensor  # [D, D]
    fc1_bias: Tensor  # [D]
    fc2_weight: Tensor  # [D, D]
    fc2_bias: Tensor  # [D]
    norm2_weight: Tensor  # [D]
    norm2_bias: Tensor  # [D]


class FReeNetWeights(NamedTuple):
    """Everything of FReeNet but its tokens and codes."""

    blocks: tuple[BlockWeights, ...]
    weight: Tensor  # [L, D], the final linear
    bias: Tensor  # [L]
    channels: int  # C
    patch: int  # side of a patch, in pixels
    patches: int  # J
    norm: str = "branch"


def freenet_block(features: Tensor, state: Tensor | None, weights: BlockWeights, norm: str = "branch") -> Tensor:
    """One recurrent block of Eq. 4.

    norm="branch" is Eq. 4 as printed, Z' = LN1(P(features)) + state; norm="sum" is Z' = LN1(P(features) + state).
    The two are one function where state is None (the first block, Z_0 = 0).

    features: [N, J, D], the shared result of `mhsc`; state: [N, J, D] or None. Returns [N, J, D].
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {NORMS}")
    w = weights
    branch = linear(features, w.proj_weight, w.proj_bias)
    if norm == "sum" or state is None:
        hidden = add_layer_norm(branch, state, w.norm1_weight, w.norm1_bias, EPS)
    else:
        hidden = add_layer_norm(branch, None, w.norm1_weight, w.norm1_bias, EPS) + state
    mlp = linear(gelu(linear(hidden, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias)
    return add_layer_norm(mlp, hidden, w.norm2_weight, w.norm2_bias, EPS)


def _decode(features: Tensor, weights: FReeNetWeights) -> Tensor:
    state = None
    for block in weights.blocks:
        state = freenet_block(features, state, block, weights.norm)
    if state is None:
        raise ValueError("FReeNet needs at least one block")
    return tokens_to_images(state, weights.weight, weights.bias, weights.channels, weights.patch)


def freenet(scm: Tensor, saet: Tensor, weights: FReeNetWeights) -> Tensor:
    """Decode codes to images: Eq. 2, with E A computed once for all blocks.

    scm: [N, H, J, K]; saet: [K, D]. Returns [N, C, H, W], in the space the data were normalised to (not [0, 1]).
    """
    return _decode(mhsc(scm, saet), weights)


def freenet_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, weights: FReeNetWeights) -> Tensor:
    """`freenet` from stored entries ([N, H, k] each): the artifact's path, with no dense code matrix of its own."""
    return _decode(mhsc_coo(values, rows, cols, saet, weights.patches), weights)
