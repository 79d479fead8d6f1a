"""The ops on the Triton backend: results and gradients against float64, opcheck, compile, and what is refused."""

from __future__ import annotations

import functools
import warnings

import forms
import pytest
import torch
from support import assert_matches, compiles
from triton_support import DEVICE, randn

from speedk import ops
from speedk.ops import (
    BlockWeights,
    FReeNetWeights,
    add_layer_norm,
    coo_decode,
    explain,
    freenet_block,
    mhsc,
    tokens_to_images,
    use_backend,
)
from speedk.ops.add_layer_norm import _add_layer_norm, _add_layer_norm_bwd
from speedk.ops.coo import _coo_decode, _coo_decode_bwd, _mhsc_coo, _mhsc_coo_bwd
from speedk.ops.freenet_block import _freenet_block, _freenet_block_bwd
from speedk.ops.mhsc import _mhsc, _mhsc_bwd
from speedk.ops.patches import _patchify, _tokens_to_images, _tokens_to_images_bwd, _unpatchify

ROWS = torch.tensor([0, 0, 2, 3, 1, 3] * 2, dtype=torch.uint8).reshape(3, 2, 2).to(DEVICE)
COLS = torch.tensor([4, 1, 2, 0, 3, 0] * 2, dtype=torch.uint8).reshape(3, 2, 2).to(DEVICE)
MATRICES = (0, 4, 6)


def block_weights(D: int) -> list[torch.Tensor]:
    return [randn(D, D, seed=20 + i) / D**0.5 if i in MATRICES else randn(D, seed=20 + i) / 4 + (i in (2, 8))
            for i in range(10)]  # fmt: skip


def decoder(weights) -> FReeNetWeights:
    blocks = tuple(BlockWeights(*weights[i:i + 10]) for i in range(0, len(weights) - 2, 10))
    return FReeNetWeights(blocks, *weights[-2:], channels=1, patch=2, patches=4, norm="branch")


DECODER = [*block_weights(6), *block_weights(6), randn(4, 6, seed=7), randn(4, seed=8)]

CASES = {  # a function of its inputs, differentiable, of the ops or of `forms`
    "mhsc": (lambda o, a, e: o.mhsc(a, e), [randn(3, 2, 4, 5), randn(5, 6, seed=1)]),
    "add_layer_norm": (lambda o, *x: o.add_layer_norm(*x),
                       [randn(3, 4, 6), randn(3, 4, 6, seed=1), randn(6, seed=2), randn(6, seed=3)]),
    "plain layer norm": (lambda o, x, w, b: o.add_layer_norm(x, None, w, b), [randn(7, 6), randn(6), randn(6, seed=3)]),
    "patchify": (lambda o, x: o.patchify(x, 2), [randn(2, 3, 4, 6)]),
    "unpatchify": (lambda o, x: o.unpatchify(x, 3, 2), [randn(2, 4, 12)]),
    "tokens_to_images": (lambda o, *x: o.tokens_to_images(*x, 3, 2),
                         [randn(2, 4, 6), randn(12, 6), randn(12, seed=2)]),
    "no features": (lambda o, *x: o.tokens_to_images(*x, 3, 2), [randn(2, 4, 0), randn(12, 0), randn(12, seed=2)]),
    "coo_decode": (lambda o, v: o.coo_decode(v, ROWS, COLS, 4, 5), [randn(3, 2, 2)]),
    "mhsc_coo": (lambda o, v, s: o.mhsc_coo(v, ROWS, COLS, s, 4), [randn(3, 2, 2), randn(5, 6, seed=1)]),
    "first block": (lambda o, x, *w: o.freenet_block(x, None, BlockWeights(*w)), [randn(3, 4, 6), *block_weights(6)]),
    "branch": (lambda o, x, z, *w: o.freenet_block(x, z, BlockWeights(*w), "branch"),
               [randn(3, 4, 6), randn(3, 4, 6, seed=1), *block_weights(6)]),
    "sum": (lambda o, x, z, *w: o.freenet_block(x, z, BlockWeights(*w), "sum"),
            [randn(3, 4, 6), randn(3, 4, 6, seed=1), *block_weights(6)]),
    "freenet": (lambda o, a, e, *w: o.freenet(a, e, decoder(w)), [randn(3, 2, 4, 5), randn(5, 6, seed=1), *DECODER]),
    "freenet_coo": (lambda o, v, e, *w: o.freenet_coo(v, ROWS, COLS, e, decoder(w)),
                    [randn(3, 2, 2), randn(5, 6, seed=1), *DECODER]),
}  # fmt: skip
CASES = {name: (functools.partial(function, ops), functools.partial(function, forms), inputs)
         for name, (function, inputs) in CASES.items()}  # fmt: skip


def run(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    cotangent = randn(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    function, form, inputs = CASES[name]
    with use_backend("triton"):
        got = run(function, inputs)
    library, exact = run(form, inputs), run(form, [x.double() for x in inputs])
    for i, triple in enumerate(zip(got, library, exact, strict=True)):
        assert_matches(f"{name} {i}", *triple)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_gradients(name):
    function, _, inputs = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says of its loop over the batch that it is one
        out = function(*leaves)
        several = randn(2, *out.shape, seed=60)
        got = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in several]
    for one, other in zip(got, zip(*each), strict=True):
        torch.testing.assert_close(one, torch.stack(other), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_autocast_takes_the_widest_dtype(name):
    function, _, (first, *rest) = CASES[name]
    narrow = first.bfloat16()
    with use_backend("triton"):
        want = function(narrow.float(), *rest)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = function(narrow if rest else narrow.float(), *rest)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("name", ["coo_decode", "patchify", "unpatchify"])
def test_second_gradients(name):
    """These are linear, so that their backward passes are differentiated by each other."""
    function, _, inputs = CASES[name]
    with use_backend("triton"):
        (x,) = (x.clone().requires_grad_() for x in inputs)
        cotangent = torch.ones_like(function(x)).requires_grad_()
        (grad,) = torch.autograd.grad(function(x), x, cotangent, create_graph=True)
        (again,) = torch.autograd.grad(grad, cotangent, x.detach())
        assert torch.equal(again, function(x))


@pytest.mark.parametrize("name", ["mhsc", "add_layer_norm", "tokens_to_images", "mhsc_coo", "sum", "freenet_coo"])
def test_second_gradients_that_are_not_there(name):
    """Of the gradient of each input alone: none may come out as if it were a constant."""
    function, _, inputs = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    for leaf in leaves:
        with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once on this backend"):
            (gradient,) = torch.autograd.grad(function(*leaves).square().sum(), leaf, create_graph=True)
            gradient.square().sum().backward()


def op_calls(layout: str):
    def new(*shape, seed=0):
        return randn(*shape, seed=seed, layout=layout)

    weights, state = block_weights(6), new(3, 4, 6, seed=1)
    images, saet, values, d_out = new(3, 3, 4, 4), new(5, 6), new(3, 2, 2), new(3, 4, 6, seed=2)
    yield _mhsc, (new(3, 2, 4, 5), saet, "triton", "triton")
    yield _mhsc_bwd, (d_out, new(3, 2, 4, 5), saet, True, True, "triton")
    yield _mhsc_bwd, (d_out, new(3, 2, 4, 5), saet, False, True, "triton")
    yield _add_layer_norm, (new(3, 4, 6), state, new(1, 6)[0], new(1, 6)[0], 1e-6)
    yield _add_layer_norm_bwd, (d_out, new(3, 4, 6), None, new(1, 6)[0], 1e-6)
    yield _patchify, (images, 2, "triton")
    yield _unpatchify, (new(3, 4, 12), 3, 2, 2, "triton")
    yield _tokens_to_images, (state, new(12, 6), new(1, 12)[0], 3, 2, "triton", "triton")
    yield _tokens_to_images_bwd, (images, state, new(12, 6), 2, True, True, "triton")
    yield _tokens_to_images_bwd, (images, state, new(12, 6), 2, False, True, "triton")
    yield _coo_decode, (values, ROWS, COLS, 4, 5, True, "triton")
    yield _coo_decode_bwd, (new(3, 2, 4, 5), ROWS, COLS, "triton")
    yield _mhsc_coo, (values, ROWS, COLS, saet, 4, True, "triton")
    yield _mhsc_coo_bwd, (d_out, values, ROWS, COLS, saet, True, True, "triton")
    yield _mhsc_coo_bwd, (d_out, values, ROWS, COLS, saet, False, True, "triton")
    yield _freenet_block, (new(3, 4, 6), state, weights, "branch", "triton")
    yield _freenet_block_bwd, (d_out, new(3, 4, 6), None, weights, "sum", "triton")


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_opcheck(layout):
    for op, arguments in op_calls(layout):
        if not op._name.endswith("_bwd"):
            arguments = [
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in arguments
            ]
        torch.library.opcheck(op, tuple(arguments))


@pytest.mark.parametrize("name", ["freenet", "freenet_coo", "unpatchify"])
def test_compile(name):
    function, _, inputs = CASES[name]
    with use_backend("triton"):
        compiles(function, *inputs)


def test_bad_indices_are_refused_when_looked_for():
    cols = COLS.clone()
    cols[1, 1, 0] = 5
    with use_backend("triton"):
        with pytest.raises(ValueError, match="below K=5"):
            coo_decode(randn(3, 2, 2), ROWS, cols, 4, 5)
        dense = coo_decode(randn(3, 2, 2), ROWS, cols, 4, 5, check=False)
        assert dense[1, 1].count_nonzero() == 1


@pytest.mark.parametrize(("call", "reason"), [
    (lambda: mhsc(randn(1, 1, 2, 3), randn(3, 300)), "heads of width 300"),
    (lambda: mhsc(randn(1, 1, 2, 3).double(), randn(3, 4).double()), "float64"),
    (lambda: add_layer_norm(randn(2, 20000), None, randn(20000), randn(20000)), "16384"),
    (lambda: freenet_block(randn(1, 2, 520), None, BlockWeights(*block_weights(520))), "512"),
    (lambda: tokens_to_images(randn(1, 1, 2), randn(140**2 * 3, 2), randn(140**2 * 3), 3, 140), "128"),
], ids=["head", "double", "row", "block", "patch"])  # fmt: skip
def test_refusals(call, reason):
    with use_backend("triton"), pytest.raises(ValueError, match=f"triton backend: .*{reason}"):
        call()
    call()


def test_a_gpu_takes_triton_and_a_cpu_only_when_asked():
    found = explain("mhsc", randn(1, 1, 2, 3), randn(3, 4))
    assert found["triton"] == ("chosen" if DEVICE == "cuda" else "available")
