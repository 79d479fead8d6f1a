"""The CUDA kernels of norm_act_pool: on a GPU where there is one, and everywhere on the CPU, a thread at a time."""

from __future__ import annotations

import ctypes

import emulation
import forms
import pytest
import torch
from support import assert_matches, built, poisoned_memory

from speedk.ops import dispatch, native, norm_act_pool
from speedk.ops.dispatch import use_backend

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# One warp a plane, one block a plane, and more channels than a block takes; odd sides in each.
SHAPES = [(1, 35, 6, 6), (2, 33, 7, 5), (1, 3, 33, 34), (1, 2, 37, 41), (0, 2, 4, 4)]
MANY = [(2, 33, 7, 5), (4, 64, 32, 32), (1, 32, 37, 41)]  # sums enough for their largest error to tell something
CASES = [*((s, torch.float64) for s in SHAPES),
         *((s, t) for s in MANY for t in native.DTYPES if t != torch.float64)]  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    call = emulation.emulated("norm_act_pool", tmp_path_factory.mktemp("emulated"))

    class Emulated:
        """Stands where speedk._native does."""

        NormActPool = staticmethod(lambda *job: job)

        def __getattr__(self, name):
            number = ["norm_act_pool", "norm_act_pool_backward", "norm_act_pool_double_backward"].index(name)

            def run(job, *rest):
                dtype, last, x, weight, bias, b, c, h, w, eps = job
                pointers = (ctypes.c_void_p * len(rest))(*rest[:-1])  # the last is the number of threads
                assert call(number, dtype, last, (ctypes.c_int64 * 4)(b, c, h, w), ctypes.c_double(eps),
                            (ctypes.c_void_p * 3)(x, weight, bias), pointers), "threads wait for others that ended"

            return run

    return Emulated()


def derivatives(function, leaves, d_out, slopes, dtype, device, layout):
    """out, its derivatives and their derivatives."""
    x, weight, bias, d_out = (t.to(device, dtype, copy=True) for t in (*leaves, d_out))
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=FORMATS[layout]), weight, bias)]
    out = function(*leaves)
    first = torch.autograd.grad(out, leaves, d_out.requires_grad_(), create_graph=True)
    second = torch.autograd.grad(first, (d_out, *leaves[:2]), [t.to(device, dtype) for t in slopes])
    return [t.detach().cpu() for t in (out, *first, *second)]


def check(shape, dtype, device, layout):
    torch.manual_seed(0)
    leaves = torch.randn(shape) * 3 + 1, torch.randn(shape[1]), torch.randn(shape[1])
    d_out, slopes = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2), [torch.randn_like(t) for t in leaves]
    leaves, d_out, slopes = [t.to(dtype) for t in leaves], d_out.to(dtype), [t.to(dtype) for t in slopes]

    with use_backend("native"), poisoned_memory():
        got = derivatives(norm_act_pool, leaves, d_out, slopes, dtype, device, layout)
    exact = derivatives(forms.norm_act_pool, leaves, d_out, slopes, torch.float64, "cpu", layout)
    if dtype == torch.float64:
        for one, other in zip(got, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        return
    library = derivatives(forms.norm_act_pool, leaves, d_out, slopes, dtype, device, layout)
    for number, triple in enumerate(zip(got, library, exact, strict=True)):
        assert_matches(f"result {number}", *triple)


@built
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated(shape, layout, emulated, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: emulated)
    check(shape, torch.float64, "cpu", layout)


@built
def test_emulated_in_float32(emulated, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: emulated)
    check((2, 32, 16, 16), torch.float32, "cpu", "contiguous")


@built
@pytest.mark.parametrize("layout", FORMATS)
def test_emulated_far_from_zero(layout, emulated, monkeypatch):
    """A plane that holds one value alone is normalised to the bias: rounding would be magnified 316 times."""
    monkeypatch.setattr(native, "native", lambda: emulated)
    x = (torch.rand(1, 8, 1, 1) * 200 - 100).repeat(1, 1, 64, 64).contiguous(memory_format=FORMATS[layout])
    bias = torch.rand(8)
    with use_backend("native"):
        out = norm_act_pool(x, torch.ones(8), bias)
    torch.testing.assert_close(out, bias[:, None, None].expand(1, 8, 32, 32))


@pytest.mark.skipif(not torch.cuda.is_available() or not dispatch.native_cuda(), reason="there is no GPU")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_on_the_gpu(shape, dtype, layout):
    check(shape, dtype, "cuda", layout)
