"""The Triton kernels of freenet_block, against float64."""

from __future__ import annotations

import forms
import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import DOT_FLOATS, LAYOUTS, gradients, kinds, randn

from speedk.kernels import freenet
from speedk.kernels.freenet import MATRICES, VECTORS, freenet_block_bwd, freenet_block_fwd
from speedk.ops.freenet_block import EPS, BlockWeights

SHAPES = [(2, 64, 32), (1, 7, 96), (3, 5, 1), (1, 3, 17), (0, 4, 8)]
WIDE = [(1, 5, 200), (1, 3, 320)]  # other blocks than the narrow ones; slow under the interpreter


KINDS = [*(("branch", *kind) for kind in kinds(SHAPES, [torch.float32])),
         *((norm, (1, 7, 96), torch.float32) for norm in ("first", "sum")),
         *(pytest.param("sum", *kind.values, marks=kind.marks) for kind in kinds(SHAPES, DOT_FLOATS)[len(SHAPES):])]


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
    library = forms.freenet_block(features, state, weights, norm)
    exact = forms.freenet_block(*double((features, state)), BlockWeights(*double(weights)), norm)
    assert_matches("block", got, library, exact)


@pytest.mark.parametrize(("norm", "shape", "dtype"), KINDS, ids=str)
def test_forward(shape, dtype, norm):
    state = None if norm == "first" else randn(*shape, dtype=dtype, seed=1)
    check_forward(randn(*shape, dtype=dtype), state, block_weights(shape[-1], dtype), norm.replace("first", "sum"))


def check_backward(d_out, features, state, weights, norm):
    with poisoned_memory():
        d_features, d_state, matrices, vectors = freenet_block_bwd(d_out, features, state, tuple(weights), norm, EPS)
    placed = dict(zip((*MATRICES, *VECTORS), (*matrices, *vectors), strict=True))
    d_weights = [placed[i] for i in range(len(weights))]

    def function(features, *rest):
        return forms.freenet_block(features, rest[0] if len(rest) > 10 else None, BlockWeights(*rest[-10:]), norm)

    inputs = [features, *([] if state is None else [state]), *weights]
    want = gradients(function, *inputs, cotangent=d_out)
    want64 = gradients(function, *double(inputs), cotangent=d_out.double())
    assert (d_state is None) == (state is None)
    got = [d_features, *([] if state is None else [d_state]), *d_weights]
    names = ["features", *([] if state is None else ["state"]), *BlockWeights._fields]
    for name, value, library, exact in zip(names, got, want, want64, strict=True):
        assert_matches(f"d_{name}", value, library, exact)


@pytest.mark.parametrize(("norm", "shape", "dtype"), KINDS, ids=str)
def test_backward(shape, dtype, norm):
    state = None if norm == "first" else randn(*shape, dtype=dtype, seed=1)
    check_backward(randn(*shape, dtype=dtype, seed=2), randn(*shape, dtype=dtype), state,
                   block_weights(shape[-1], dtype), norm.replace("first", "sum"))  # fmt: skip


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide(shape):
    d_out, features, state = (randn(*shape, seed=s) for s in (2, 0, 1))
    weights = block_weights(shape[-1], torch.float32)
    check_forward(features, state, weights, "sum")
    check_backward(d_out, features, state, weights, "branch")


CHUNKED = [  # each way to take tokens a chunk at a time
    (20, torch.float32, "branch"),  # the gradients of all weights in the one kernel
    (48, torch.float32, "branch"),  # those of the matrices by products of their own
    (70, torch.float16, "sum"),  # the same, with the MLP some columns at a time
    (70, torch.float32, "sum"),  # one kernel forward, the library's products backward
    (136, torch.float32, "branch"),  # the library's products both ways
]


@pytest.mark.parametrize(("D", "dtype", "norm"), CHUNKED, ids=str)
def test_in_chunks(monkeypatch, D, dtype, norm):
    for most in ("CHUNK", "WIDE_CHUNK", "WIDE_FORWARD"):
        monkeypatch.setattr(freenet, most, 70)
    monkeypatch.setattr(freenet, "LEAST", 1)
    taken = counted(monkeypatch, "narrow"), counted(monkeypatch, "wide")
    features, state, d_out = (randn(6, 25, D, seed=s, dtype=dtype) for s in range(3))
    weights = block_weights(D, dtype)
    check_forward(features, state, weights, norm)
    check_backward(d_out, features, state, weights, norm)
    assert sorted(map(len, taken)) == [0, 3]


def counted(monkeypatch, name: str) -> list:
    """The chunks that the backward pass of freenet.`name` is given from here on."""
    module, chunks = getattr(freenet, name), []
    given = module.backward_chunk
    monkeypatch.setattr(module, "backward_chunk", lambda *args: (chunks.append(args), given(*args)))
    return chunks


@pytest.mark.parametrize("D", [1, 136])
def test_what_stands_beyond_a_row_stays_out_of_float16(D):
    """Rows that a norm finds all alike have gradients of zero, times 1 / sqrt(eps): beyond them that is infinite."""
    weights = [torch.zeros_like(w) for w in block_weights(D, torch.float16)]
    for i in (2, 3, 8):  # norm1_weight, norm1_bias, norm2_weight
        weights[i] += 1
    features = randn(1, 3, D, dtype=torch.float16)
    got = freenet_block_bwd(torch.full_like(features, 100), features, None, tuple(weights), "branch", EPS)
    assert all(torch.isfinite(t).all() for t in got if t is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    features, state, d_out = (randn(3, 6, 24, seed=s, layout=layout) for s in range(3))
    weights = block_weights(24, torch.float32, "plain" if layout == "expanded" else layout)
    check_forward(features, state, weights, "branch")
    check_backward(d_out, features, state, weights, "sum")
