"""One recurrent block of FReeNet (paper, Eq. 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import gelu, linear

from speedk.ops import arguments, dispatch, native_block, registered
from speedk.ops.add_layer_norm import add_layer_norm_reference

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


PER_BLOCK = len(BlockWeights._fields)
"""Tensors of BlockWeights."""


@dispatch.public
def freenet_block(features: Tensor, state: Tensor | None, weights: BlockWeights, norm: str = "branch") -> Tensor:
    """One recurrent block of Eq. 4.

    norm="branch" is Eq. 4 as printed, Z' = LN1(P(features)) + state; norm="sum" is Z' = LN1(P(features) + state).
    The two are one function where state is None (the first block, Z_0 = 0).

    Differentiable once in features, state and weights (any number of times on the torch backend); on the others nothing
    but the arguments is kept for the backward pass.

    features: [N, J, D] floating, any strides, the shared result of `mhsc`; state: [N, J, D] or None; weights: as
    BlockWeights or its ten in order; all of one dtype. Returns [N, J, D].
    Raises ValueError where shapes, dtypes or devices do not fit or `norm` is neither.
    Backends: native (CUDA, D of 96, not float64), Triton, torch.
    """
    _fits(features, state, weights, norm)
    backend = _op.choose(features, state, weights)
    if backend == "torch":
        return freenet_block_reference(features, state, BlockWeights(*weights), norm)
    return _freenet_block(features, state, list(weights), norm, backend)


MATRICES = ("proj_weight", "fc1_weight", "fc2_weight")


def freenet_block_reference(features: Tensor, state: Tensor | None, weights: BlockWeights, norm: str) -> Tensor:
    w = weights
    branch = linear(features, w.proj_weight, w.proj_bias)
    if norm == "sum" or state is None:
        hidden = add_layer_norm_reference(branch, state, w.norm1_weight, w.norm1_bias, EPS)
    else:
        hidden = add_layer_norm_reference(branch, None, w.norm1_weight, w.norm1_bias, EPS) + state
    mlp = linear(gelu(linear(hidden, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias)
    return add_layer_norm_reference(mlp, hidden, w.norm2_weight, w.norm2_bias, EPS)


def _fits(features: Tensor, state: Tensor | None, weights: Sequence[Tensor], norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {NORMS}")
    if features.ndim != 3:
        raise ValueError(f"features must be [N, J, D], got {tuple(features.shape)}")
    if state is not None and state.shape != features.shape:
        raise ValueError(f"features are {tuple(features.shape)} but state is {tuple(state.shape)}")
    fits_block(weights, features=features)
    arguments.alike(features=features, state=state)


def fits_block(weights: Sequence[Tensor], **tokens: Tensor) -> None:
    """Raise ValueError unless `weights` are those of a block for the D columns of the one tensor in `tokens`."""
    ((of, first),) = tokens.items()
    if len(weights) != PER_BLOCK:
        raise ValueError(f"a block has the {PER_BLOCK} weights of BlockWeights, got {len(weights)}: "
                         f"{[tuple(weight.shape) for weight in weights]}")
    D = first.shape[-1]
    row, square = (D,), (D, D)
    named = dict(zip(BlockWeights._fields, weights))
    for name, weight in named.items():
        if weight.shape != (square if name in MATRICES else row):
            raise ValueError(f"{of} has D={D}, which does not fit a {name} of {tuple(weight.shape)}")
    arguments.alike(**tokens, **named)


WIDEST = 512
"""Values of a token that one program of the Triton kernel holds."""


def why_not_triton(features: Tensor, state: Tensor | None, weights: Sequence[Tensor]) -> str | None:
    tensors = [features, *weights] if state is None else [features, state, *weights]
    if features.shape[-1] > WIDEST:
        return f"D={features.shape[-1]} is wider than the {WIDEST} that one program holds"
    return dispatch.why_not_triton(*tensors)


def why_not_native(features: Tensor, state: Tensor | None, weights: Sequence[Tensor]) -> str | None:
    missing = dispatch.why_not_native_cuda(features)
    if missing is not None:
        return missing
    if features.shape[-1] != native_block.width():
        return f"there is no kernel for D={features.shape[-1]}"
    return native_block.why_not(features.dtype, features.device.index)


_op = dispatch.Op("freenet_block", triton=why_not_triton, native=why_not_native, cuda=True, cpu=False, first="native")


@registered.custom_op("speedk::freenet_block")
def _freenet_block(features: Tensor, state: Tensor | None, weights: list[Tensor], norm: str, backend: str) -> Tensor:
    _fits(features, state, weights, norm)
    launch = dispatch.launchers(backend, "freenet", cuda=True).freenet_block_fwd
    return launch(features, state, tuple(weights), norm, EPS)


@_freenet_block.register_fake
def _(features: Tensor, state: Tensor | None, weights: list[Tensor], norm: str, backend: str) -> Tensor:
    return features.new_empty(features.shape)


@registered.custom_op("speedk::freenet_block_bwd")
def _freenet_block_bwd(d_out: Tensor, features: Tensor, state: Tensor | None, weights: list[Tensor],
                       norm: str, backend: str) -> list[Tensor]:
    """d_features, d_state (empty without a state), and those of the weights: matrices [3, D, D], vectors [7, D]."""
    _fits(features, state, weights, norm)
    arguments.shaped("d_out", d_out, features.shape)
    arguments.alike(d_out=d_out, features=features)
    launch = dispatch.launchers(backend, "freenet", cuda=True).freenet_block_bwd
    d_features, d_state, d_matrices, d_vectors = launch(d_out, features, state, tuple(weights), norm, EPS)
    return [d_features, features.new_empty(0) if d_state is None else d_state, d_matrices, d_vectors]


@_freenet_block_bwd.register_fake
def _(d_out: Tensor, features: Tensor, state: Tensor | None, weights: list[Tensor], norm: str,
      backend: str) -> list[Tensor]:
    D = features.shape[-1]
    shapes = [features.shape, (0,) if state is None else state.shape, (3, D, D), (7, D)]
    return [features.new_empty(shape) for shape in shapes]


def _save(ctx, inputs, output) -> None:
    features, state, weights, *ctx.settings = inputs
    ctx.save_for_backward(features, state, *weights)


def _backward(ctx, d_out: Tensor):
    features, state, *weights = ctx.saved_tensors
    if dispatch.batched(d_out):
        tensors = [features, *weights] if state is None else [features, *weights, state]
        block = functools.partial(_in_torch, ctx.settings[0])
        d_features, *d_weights = dispatch.gradients_in_torch(block, tensors, d_out)
        return d_features, None if state is None else d_weights[PER_BLOCK], d_weights[:PER_BLOCK], None, None
    d_features, d_state, d_matrices, d_vectors = _freenet_block_bwd(d_out, features, state, weights, *ctx.settings)
    matrices, vectors = iter(d_matrices.unbind()), iter(d_vectors.unbind())
    d_weights = [next(matrices if weight.ndim == 2 else vectors) for weight in weights]
    return d_features, None if state is None else d_state, d_weights, None, None


def _in_torch(norm: str, features: Tensor, *weights: Tensor) -> Tensor:
    """The block with its state last, which may be missing."""
    state = weights[PER_BLOCK] if len(weights) > PER_BLOCK else None
    return freenet_block_reference(features, state, BlockWeights(*weights[:PER_BLOCK]), norm)


_freenet_block.register_autograd(_backward, setup_context=_save)
_freenet_block_bwd.ends("freenet_block")
