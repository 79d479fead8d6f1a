"""add_layer_norm in PyTorch, and the decoder that is made of it: values, gradients summed over many rows, refusals."""

from __future__ import annotations

import forms
import pytest
import torch
from support import DEVICES, FLOATS, LAYOUTS, assert_matches, strided

from speedk import ops
from speedk.ops import BlockWeights, FReeNetWeights, add_layer_norm, use_backend

SHAPES = [(4, 16, 96), (131, 32), (1, 1), (2, 3, 7, 37), (0, 8), (5,)]
HALVES = [torch.float16, torch.bfloat16]


def run(function, inputs, d_out, dtype, device="cpu"):
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
    out = function(*leaves)
    return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, leaves, d_out.to(device, dtype)))]


def plain(o):
    return lambda x, weight, bias: o.add_layer_norm(x, None, weight, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, with_residual, device):
    D = shape[-1]
    inputs = [t.to(dtype) for t in (3 + torch.randn(shape), torch.randn(shape), torch.randn(D), torch.randn(D))]
    d_out = torch.randn(shape).to(dtype)
    op, form = ops.add_layer_norm, forms.add_layer_norm
    if not with_residual:
        op, form, inputs = plain(ops), plain(forms), [inputs[0], *inputs[2:]]
    with use_backend("torch"):
        got = run(op, inputs, d_out, dtype, device)
    triples = zip(got, run(form, inputs, d_out, dtype, device), run(form, inputs, d_out, torch.float64), strict=True)
    for i, triple in enumerate(triples):
        assert_matches(f"tensor {i}", *triple)


N, J, D = 1280, 9, 24
ROWS, VECTORS = [(N, J, D)] * 2, [(D,)] * 2
BLOCK = [(D, D) if i in (0, 4, 6) else (D,) for i in range(10)]


def decoder(o, scm, saet, *w):
    blocks = tuple(BlockWeights(*w[i:i + 10]) for i in (0, 10))
    return o.freenet(scm, saet, FReeNetWeights(blocks, *w[20:], channels=1, patch=2, patches=J))


SUMS = {
    "add_layer_norm": (lambda o, *x: o.add_layer_norm(*x), [*ROWS, *VECTORS]),
    "plain layer norm": (lambda o, *x: plain(o)(*x), [ROWS[0], *VECTORS]),
    "freenet_block": (lambda o, x, z, *w: o.freenet_block(x, z, BlockWeights(*w)), [*ROWS, *BLOCK]),
    "sum": (lambda o, x, z, *w: o.freenet_block(x, z, BlockWeights(*w), "sum"), [*ROWS, *BLOCK]),
    "freenet": (decoder, [(N, 2, J, 5), (5, D), *BLOCK, *BLOCK, (4, D), (4,)]),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_half_precision_is_summed_in_float32(name, dtype):
    """Over 11,520 rows: sums of ones in bfloat16 end at 256."""
    function, shapes = SUMS[name]
    inputs = [torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    inputs = [t.to(dtype) for t in inputs]
    with use_backend("torch"):
        d_out = 1 + torch.randn(function(ops, *inputs).shape).to(dtype)
        got = run(lambda *x: function(ops, *x), inputs, d_out, dtype)
    exact = run(lambda *x: function(forms, *x), inputs, d_out, torch.float64)
    for i, (one, other) in enumerate(zip(got, exact, strict=True)):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert one.dtype == dtype and error <= 4 * torch.finfo(dtype).eps, f"tensor {i} is off by {error:.3g}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, residual = strided(torch.randn(3, 6, 40), layout), strided(torch.randn(3, 6, 40), layout)
    weight, bias = torch.randn(80)[::2], torch.randn(1).expand(40)
    with use_backend("torch"):
        got = add_layer_norm(x, residual, weight, bias)
    torch.testing.assert_close(got, forms.add_layer_norm(x, residual, weight, bias))


def test_refusals():
    x, row = torch.randn(3, 4), torch.randn(4)
    for message, call in {
        r"x is \(3, 4\) but residual is \(3, 5\)": lambda: add_layer_norm(x, torch.randn(3, 5), row, row),
        r"weight and bias must be \[4\], got \(4,\) and \(3,\)": lambda: add_layer_norm(x, None, row, row[:3]),
        "bias is torch.float64": lambda: add_layer_norm(x, x, row, row.double()),
        "floating dtype": lambda: add_layer_norm(x.long(), None, row, row),
        r"x is \(\)": lambda: add_layer_norm(x.sum(), None, row, row),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
