"""The Triton kernels of mhsc, against float64."""

from __future__ import annotations

import forms
import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import DOT_FLOATS, LAYOUTS, gradients, kinds, randn

from speedk.kernels.mhsc import mhsc_bwd, mhsc_fwd

SHAPES = [  # N, H, J, K, D
    (3, 2, 64, 16, 32),  # a recipe's: CIFAR-10, 1 image per class
    (2, 3, 16, 64, 96),
    (1, 1, 1, 1, 1),
    (2, 3, 7, 37, 33),
    (5, 4, 13, 70, 192),  # heads of 48, more tokens than one block of columns
    (1, 1, 5, 20, 200),
]


@pytest.mark.parametrize(("shape", "dtype"), kinds(SHAPES, DOT_FLOATS), ids=str)
def test_forward(shape, dtype):
    n, h, j, k, d = shape
    scm, saet = randn(n, h, j, k, dtype=dtype), randn(k, d, dtype=dtype, seed=1)
    with poisoned_memory():
        got = mhsc_fwd(scm, saet)
    assert_matches("mhsc", got, forms.mhsc(scm, saet), forms.mhsc(scm.double(), saet.double()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    scm, saet = randn(3, 2, 9, 20, layout=layout), randn(20, 24, seed=1, layout=layout)
    exact = forms.mhsc(scm.double(), saet.double())
    assert_matches("mhsc", mhsc_fwd(scm, saet), forms.mhsc(scm, saet), exact)
    d_out = randn(3, 9, 24, seed=2, layout=layout)
    want = gradients(forms.mhsc, scm, saet, cotangent=d_out)
    want64 = gradients(forms.mhsc, scm.double(), saet.double(), cotangent=d_out.double())
    for name, got, library, exact in zip(("d_scm", "d_saet"), mhsc_bwd(d_out, scm, saet), want, want64, strict=True):
        assert_matches(name, got, library, exact)


@pytest.mark.parametrize(("shape", "dtype"), kinds(SHAPES, DOT_FLOATS), ids=str)
def test_backward(shape, dtype):
    n, h, j, k, d = shape
    scm, saet, d_out = (randn(n, h, j, k, dtype=dtype), randn(k, d, dtype=dtype, seed=1),
                        randn(n, j, d, dtype=dtype, seed=2))  # fmt: skip
    want = gradients(forms.mhsc, scm, saet, cotangent=d_out)
    want64 = gradients(forms.mhsc, scm.double(), saet.double(), cotangent=d_out.double())
    with poisoned_memory():
        d_scm, d_saet = mhsc_bwd(d_out, scm, saet)
    assert_matches("d_scm", d_scm, want[0], want64[0])
    assert_matches("d_saet", d_saet, want[1], want64[1])
    assert torch.equal(mhsc_bwd(d_out, scm, saet, need_saet=False)[0], d_scm)
    none, again = mhsc_bwd(d_out, scm, saet, need_scm=False)
    assert none is None and torch.equal(again, d_saet)


def test_split_tokens(monkeypatch):
    """Each partial sum of d_saet walks several blocks of tokens."""
    monkeypatch.setattr("speedk.kernels.mhsc.SPLIT_PROGRAMS", 4)
    scm, saet, d_out = randn(9, 2, 50, 17), randn(17, 10, seed=1), randn(9, 50, 10, seed=2)
    want = gradients(forms.mhsc, scm, saet, cotangent=d_out)
    want64 = gradients(forms.mhsc, scm.double(), saet.double(), cotangent=d_out.double())
    for name, got, library, exact in zip(("d_scm", "d_saet"), mhsc_bwd(d_out, scm, saet), want, want64, strict=True):
        assert_matches(name, got, library, exact)


@pytest.mark.parametrize("shape", [(0, 2, 4, 3, 6), (2, 2, 0, 3, 6), (2, 2, 4, 0, 6), (2, 2, 4, 3, 0)], ids=str)
def test_empty(shape):
    n, h, j, k, d = shape
    scm, saet = randn(n, h, j, k), randn(k, d)
    with poisoned_memory():
        assert torch.equal(mhsc_fwd(scm, saet), scm.new_zeros(n, j, d))
        for got, like in zip(mhsc_bwd(randn(n, j, d), scm, saet), (scm, saet), strict=True):
            assert torch.equal(got, torch.zeros_like(like))
