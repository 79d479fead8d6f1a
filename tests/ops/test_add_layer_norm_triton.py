"""The Triton kernels of add_layer_norm, against float64."""

from __future__ import annotations

import forms
import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import FLOATS, LAYOUTS, gradients, randn

from speedk.kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

EPS = 1e-6
SHAPES = [(4, 16, 96), (3, 5, 192), (131, 32), (1, 1), (2, 3, 7, 37), (3, 5000)]


def check(x, residual, weight, bias, d_out):
    def reference(x, weight, bias, residual=None):
        return forms.add_layer_norm(x, residual, weight, bias, EPS)

    inputs = [x, weight, bias] + ([] if residual is None else [residual])
    wide = [t.double() for t in inputs]
    with poisoned_memory():
        out = add_layer_norm_fwd(x, residual, weight, bias, EPS)
        d_x, d_weight, d_bias = add_layer_norm_bwd(d_out, x, residual, weight, EPS)
    assert_matches("out", out, reference(*inputs), reference(*wide))
    want = gradients(reference, *inputs, cotangent=d_out)
    want64 = gradients(reference, *wide, cotangent=d_out.double())
    got = [d_x, d_weight, d_bias] + ([] if residual is None else [d_x])
    names = ["x", "weight", "bias", "residual"]
    for name, value, library, exact in zip(names, got, want, want64, strict=False):
        assert_matches(f"d_{name}", value, library, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_values(shape, dtype, with_residual):
    x = randn(*shape, dtype=dtype) + 3  # a mean that is far from zero
    residual = randn(*shape, dtype=dtype, seed=1) if with_residual else None
    check(x, residual, randn(shape[-1], dtype=dtype, seed=2), randn(shape[-1], dtype=dtype, seed=3),
          randn(*shape, dtype=dtype, seed=4))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    x, residual, d_out = (randn(3, 6, 40, seed=s, layout=layout) for s in range(3))
    check(x, residual, randn(80, seed=3)[::2], randn(1, seed=4).expand(40), d_out)


def test_rows_shared_among_programs(monkeypatch):
    monkeypatch.setattr("speedk.kernels.add_layer_norm.BACKWARD_PROGRAMS", 2)
    check(randn(333, 24), randn(333, 24, seed=1), randn(24, seed=2), randn(24, seed=3), randn(333, 24, seed=4))


def test_a_large_mean_does_not_cancel():
    """The variance is that of centred values: E[x^2] - E[x]^2 would lose every digit here. The sum is exact in any
    order, so that what is left is the variance's own error."""
    x = (8 * randn(4, 64)).round() / 8 + 4096
    check(x, None, torch.ones(64, device=x.device), torch.zeros(64, device=x.device), randn(4, 64, seed=1))


def test_empty():
    weight = randn(8)
    assert add_layer_norm_fwd(randn(0, 8), None, weight, weight, EPS).shape == (0, 8)
    d_x, d_weight, d_bias = add_layer_norm_bwd(randn(0, 8), randn(0, 8), None, weight, EPS)
    assert d_x.shape == (0, 8) and not d_weight.any() and not d_bias.any()


def test_sums_in_memory(monkeypatch):
    """As for rows that are too wide for registers, in several blocks a program."""
    monkeypatch.setattr("speedk.kernels.add_layer_norm.WIDEST_IN_REGISTERS", 20)
    monkeypatch.setattr("speedk.kernels.add_layer_norm.BACKWARD_PROGRAMS", 8)
    check(randn(333, 24), randn(333, 24, seed=1), randn(24, seed=2), randn(24, seed=3), randn(333, 24, seed=4))
