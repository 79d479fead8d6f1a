"""mhsc on every backend but Triton: Eq. 3 by loops over heads, gradients, strides, refusals."""

from __future__ import annotations

import forms
import pytest
import torch
from support import (
    BY_EACH_UNIT,
    DEVICES,
    LAYOUTS,
    assert_matches,
    built,
    compiles,
    on_backends,
    poisoned_memory,
    products_by,
    strided,
)

from speedk.ops import mhsc, use_backend
from speedk.ops.mhsc import _mhsc, _mhsc_bwd

SHAPES = [  # N, H, J, K, D
    (3, 2, 64, 16, 32),  # CIFAR-10, 1 image per class
    (2, 6, 64, 64, 192),
    (2, 3, 7, 37, 33),
    (11, 1, 13, 5, 17),  # more images than partial sums
    (2, 2, 45, 6, 8),  # a block of rows and a part of one
    (1, 1, 1, 1, 1),
    (0, 2, 8, 4, 6),
    (2, 2, 0, 4, 6),
    (2, 2, 8, 0, 6),
    (2, 2, 8, 4, 0),
]


def run(function, scm, saet, d_out, dtype, device="cpu"):
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (scm, saet)]
    out = function(*leaves)
    return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, leaves, d_out.to(device, dtype)))]


@on_backends("mhsc", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, device, backend):
    n, h, j, k, d = shape
    inputs = torch.randn(n, h, j, k, dtype=dtype), torch.randn(k, d, dtype=dtype), torch.randn(n, j, d, dtype=dtype)
    with use_backend(backend), poisoned_memory():
        got = run(mhsc, *inputs, dtype, device)
    library, exact = run(forms.mhsc, *inputs, dtype, device), run(forms.mhsc, *inputs, torch.float64)
    for name, *triple in zip(("features", "d_scm", "d_saet"), got, library, exact):
        assert_matches(name, *triple)


@BY_EACH_UNIT
@pytest.mark.parametrize("shape", [(2, 6, 64, 64, 192), (2, 3, 7, 37, 33), (3, 1, 45, 130, 40)], ids=str)
def test_products_by_each_unit(shape, unit):
    n, h, j, k, d = shape
    inputs = torch.randn(n, h, j, k), torch.randn(k, d), torch.randn(n, j, d)
    with use_backend("native"), products_by(unit), poisoned_memory():
        got = run(mhsc, *inputs, torch.float32)
    library, exact = run(forms.mhsc, *inputs, torch.float32), run(forms.mhsc, *inputs, torch.float64)
    for name, *triple in zip(("features", "d_scm", "d_saet"), got, library, exact):
        assert_matches(name, *triple)


@on_backends("mhsc")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    scm, saet = strided(torch.randn(3, 2, 9, 20), layout), strided(torch.randn(20, 12), layout)
    with use_backend(backend):
        assert_matches("features", mhsc(scm, saet), forms.mhsc(scm, saet), forms.mhsc(scm.double(), saet.double()))


@on_backends("mhsc")
def test_half_precision_or_a_reason(backend):
    scm, saet = torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(8, 6).bfloat16()
    with use_backend(backend):
        if backend == "native":
            with pytest.raises(ValueError, match="bfloat16 is computed in PyTorch"):
                mhsc(scm, saet)
        else:
            exact = forms.mhsc(scm.double(), saet.double())
            assert_matches("features", mhsc(scm, saet), forms.mhsc(scm, saet), exact)


@on_backends("mhsc")
def test_one_gradient_alone(backend):
    scm, saet = torch.randn(2, 2, 5, 8), torch.randn(8, 6)
    with use_backend(backend):
        for wanted in (scm, saet):
            wanted.requires_grad_()
            (got,) = torch.autograd.grad(mhsc(scm, saet).square().sum(), wanted)
            (want,) = torch.autograd.grad(forms.mhsc(scm, saet).square().sum(), wanted)
            assert torch.allclose(got, want, atol=1e-4)
            wanted.requires_grad_(False)


@on_backends("mhsc")
def test_gradcheck(backend):
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 4), (4, 6))]
    with use_backend(backend):
        assert torch.autograd.gradcheck(mhsc, inputs)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    scm, saet = strided(torch.randn(3, 2, 9, 8), layout).detach(), strided(torch.randn(8, 6), layout).detach()
    d_out = strided(torch.randn(3, 9, 6), layout)
    torch.library.opcheck(_mhsc_bwd, (d_out, scm, saet, True, True, "native"))
    torch.library.opcheck(_mhsc_bwd, (d_out, scm, saet, True, False, "native"))
    torch.library.opcheck(_mhsc, (scm.requires_grad_(), saet.requires_grad_(), "native", "native"))


@on_backends("mhsc")
def test_compile(backend):
    with use_backend(backend):
        compiles(lambda a, e: mhsc(a * 2, e), torch.randn(2, 2, 5, 8), torch.randn(8, 6))


def test_transforms_take_torch():
    scm, saet = torch.randn(3, 2, 5, 8, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    _, tangent = torch.func.jvp(mhsc, (scm, saet), (scm, torch.zeros_like(saet)))
    assert torch.allclose(tangent, forms.mhsc(scm, saet))
    batched = torch.vmap(lambda a: mhsc(a[None], saet)[0])(scm)
    assert torch.allclose(batched, forms.mhsc(scm, saet))
    hessian = torch.func.hessian(lambda e: mhsc(scm, e).square().sum())(saet)
    assert torch.allclose(hessian.reshape(48, 48), hessian.reshape(48, 48).T)


def test_refusals():
    for message, shapes in {
        "saet has K=7 tokens but scm has K=8 columns": ((2, 2, 5, 8), (7, 6)),
        "D=5 is not a multiple of H=2 heads": ((2, 2, 5, 8), (8, 5)),
        r"got \(2, 5, 8\)": ((2, 5, 8), (8, 6)),
        "H=0 heads": ((2, 0, 5, 8), (8, 6)),
    }.items():
        with pytest.raises(ValueError, match=message):
            mhsc(*(torch.randn(s) for s in shapes))
    with pytest.raises(ValueError, match="saet is torch.float64 but scm is torch.float32"):
        mhsc(torch.randn(2, 2, 5, 8), torch.randn(8, 6).double())
