"""The Triton kernels of freenet_block, against float64."""

from __future__ import annotations

import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import DOT_FLOATS, LAYOUTS, randn

from speedk.kernels.freenet import freenet_block_fwd
from speedk.ops.freenet import EPS, BlockWeights, freenet_block

SHAPES = [(2, 64, 32), (1, 7, 96), (3, 5, 1), (1, 3, 17), (1, 5, 200), (1, 3, 320), (0, 4, 8)]


def block_weights(D: int, dtype: torch.dtype, layout: str = "plain") -> BlockWeights:
    """Weights of the size that training finds: products of unit variance, norms near one."""
    shapes = [(D, D), (D,), (D,), (D,), (D, D), (D,), (D, D), (D,), (D,), (D,)]
    weights = []
    for seed, shape in enumerate(shapes):
        if len(shape) == 2:
            weights.append(randn(*shape, seed=10 + seed, layout=layout).to(dtype) / D**0.5)
        else:
            weights.append((randn(*shape, seed=10 + seed) / 4 + (seed in (2, 8))).to(dtype))
    return BlockWeights(*weights)


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check_forward(features, state, weights, norm):
    with poisoned_memory():
        got = freenet_block_fwd(features, state, tuple(weights), norm, EPS)
    library = freenet_block(features, state, weights, norm)
    exact = freenet_block(*double((features, state)), BlockWeights(*double(weights)), norm)
    assert_matches("block", got, library, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DOT_FLOATS)
@pytest.mark.parametrize("norm", ["first", "branch", "sum"])
def test_forward(shape, dtype, norm):
    state = None if norm == "first" else randn(*shape, dtype=dtype, seed=1)
    check_forward(randn(*shape, dtype=dtype), state, block_weights(shape[-1], dtype), norm.replace("first", "sum"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    features, state = (randn(3, 6, 24, seed=s, layout=layout) for s in range(2))
    check_forward(features, state, block_weights(24, torch.float32, layout), "branch")
