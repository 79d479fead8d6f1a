"""The CUDA kernel of the way back through codes times SAETs and through the last linear, on the CPU, a thread at a
time, and on a GPU, against float64: heads of each width, slices of codes, one gradient alone, images in patches."""

from __future__ import annotations

import ctypes
import importlib
import types

import emulation
import pytest
import torch
from support import built, poisoned_memory

from speedk.ops import dispatch, mhsc, native, native_linear, tokens_to_images, use_backend
from speedk.ops.mhsc import mhsc_reference
from speedk.ops.patches import tokens_to_images_reference

mhsc_module, patches_module = (importlib.import_module(f"speedk.ops.{name}") for name in ("mhsc", "patches"))
PRODUCTS = {"tf32": (True, 5e-4), "float32": (False, 2e-6)}  # tf32 allowed, how far off a result may be, of its length
CODES = [(1, 1, 16, 64, 32), (3, 2, 48, 64, 32), (2, 2, 32, 128, 48), (1, 3, 16, 64, 64)]  # N, H, J, K, D / H
PATCHES = [(1, 16, 48, 4), (3, 64, 96, 4), (1, 16, 96, 4), (2, 16, 192, 8)]  # N, J, D, patch


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    linear = emulation.emulated("linear_backward", tmp_path_factory.mktemp("emulated"))
    sums, turn = (emulation.also(linear, name) for name in ("sum_rows", "in_the_other_order"))

    class Emulated:
        """Stands where speedk._native does."""

        in_the_other_order = staticmethod(turn)
        linear_programs = staticmethod(lambda W: 1)

        @staticmethod
        def LinearBackward(tf32, images, parts, J, K, W, inputs, weight, part, of_k, of_column, d_tokens, *image):
            assert all(address % 16 == 0 for address in (inputs, weight, d_tokens)) and J % 16 == 0
            return tf32, (images, parts, J, K, W, part, of_k, of_column, *image), (inputs, weight, d_tokens)

        @staticmethod
        def linear_backward(job, inputs, d_inputs, partial, size, splits, threads):
            tf32, sizes, tensors = job
            assert linear(tf32, (ctypes.c_int64 * 10)(*sizes), (ctypes.c_void_p * 5)(*tensors, d_inputs, partial),
                          ctypes.c_int64(size), ctypes.c_int64(splits))

        @staticmethod
        def sum_rows(dtype, partial, out, rest, rows, size, first, threads):
            assert dtype == native.DTYPES[torch.float32] and (rest or first == size)
            assert sums(ctypes.c_void_p(partial), *map(ctypes.c_int64, (rows, size, first)),
                        *map(ctypes.c_void_p, (out, rest)))  # fmt: skip

    return Emulated()


@pytest.fixture(params=["", "in the other order"])
def in_its_place(request, emulated, monkeypatch):
    for module in (native, native_linear):
        monkeypatch.setattr(module, "native", lambda: emulated)
    monkeypatch.setattr(native_linear, "_missing", lambda *given: None)
    emulated.in_the_other_order(bool(request.param))


@pytest.fixture(params=PRODUCTS)
def close(request, monkeypatch):
    tf32, close = PRODUCTS[request.param]
    monkeypatch.setattr(native_linear, "tf32_allowed", lambda: tf32)
    return close


def alike(found, wanted, close):
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got.double() - want).norm() <= close * want.norm()
        length = (got.double() * want).sum() / want.square().sum()
        assert abs(length - 1) < 2e-4  # what tf32 cuts off is made up for: 4e-4 to 8e-4 otherwise


def check_codes(N, H, J, K, width, close, device):
    scm, saet = torch.randn(N, H, J, K, device=device), torch.randn(K, H * width, device=device)
    d_out = torch.randn(N, H * width, J, device=device).mT  # of other strides
    leaves = [t.double().requires_grad_() for t in (scm, saet)]
    wanted = torch.autograd.grad(mhsc_reference(*leaves), leaves, d_out.double())
    with poisoned_memory():
        alike(native_linear.mhsc_bwd(d_out, scm, saet, True, True), wanted, close)
        d_scm, none = native_linear.mhsc_bwd(d_out, scm, saet, True, False)
        assert none is None
        also_none, d_saet = native_linear.mhsc_bwd(d_out, scm, saet, False, True)
        assert also_none is None
    alike((d_scm, d_saet), wanted, close)


def check_patches(N, J, D, patch, close, device):
    state, weight = torch.randn(N, J, D, device=device), torch.randn(3 * patch**2, D, device=device)
    side = patch * round(J**0.5)
    d_images = torch.randn(N, 3, side, side, device=device) + 0.3
    leaves = [t.double().requires_grad_() for t in (state, weight, torch.randn(len(weight), device=device))]
    wanted = torch.autograd.grad(tokens_to_images_reference(*leaves, 3, patch), leaves, d_images.double())
    with poisoned_memory():
        alike(native_linear.tokens_to_images_bwd(d_images, state, weight, patch), wanted, close)
        d_state, *none = native_linear.tokens_to_images_bwd(d_images, state, weight, patch, need_weight=False)
        also_none, *found = native_linear.tokens_to_images_bwd(d_images, state, weight, patch, need_state=False)
        assert none == [None, None] and also_none is None
    alike((d_state, *found), wanted, close)


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize(("N", "H", "J", "K", "width"), CODES)
def test_codes_emulated(N, H, J, K, width, programs, close, in_its_place, monkeypatch):
    monkeypatch.setattr(native_linear, "MULTIPROCESSORS", programs)
    check_codes(N, H, J, K, width, close, "cpu")


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize(("N", "J", "D", "patch"), PATCHES)
def test_patches_emulated(N, J, D, patch, programs, close, in_its_place, monkeypatch):
    monkeypatch.setattr(native_linear, "MULTIPROCESSORS", programs)
    check_patches(N, J, D, patch, close, "cpu")


def test_a_nan_stays_in_its_token(close, in_its_place):
    scm, saet, d_out = torch.randn(1, 1, 16, 64), torch.randn(64, 32), torch.randn(1, 16, 32)
    d_out[0, 7, 3] = torch.nan
    d_scm, _ = native_linear.mhsc_bwd(d_out, scm, saet, True, False)
    assert d_scm[0, 0, 7].isnan().all() and d_scm[0, 0, torch.arange(16) != 7].isfinite().all()


def test_as_registered_ops(close, in_its_place, monkeypatch):
    """PyTorch looks at what they return: no two results may share memory."""
    monkeypatch.setattr(dispatch, "launchers", lambda *where: native_linear)
    scm, saet, d_out = torch.randn(1, 3, 16, 64), torch.randn(64, 96), torch.randn(1, 16, 96)
    state, weight, d_images = torch.randn(1, 16, 96), torch.randn(48, 96), torch.randn(1, 3, 16, 16)
    for op, given, launch in (("mhsc_bwd", (d_out, scm, saet), native_linear.mhsc_bwd),
                              ("tokens_to_images_bwd", (d_images, state, weight, 4),
                               native_linear.tokens_to_images_bwd)):
        found = getattr(torch.ops.speedk, op)(*given, True, True, "native")
        assert all(torch.equal(got, want) for got, want in zip(found, launch(*given, True, True), strict=True))


@built
def test_the_launcher_knows_what_there_is():
    """As the extension says, whose sizes PyTorch's compiler cannot ask for."""
    extension = dispatch.native()
    for K in (48, 64, 128, 192, 256):
        for width in (16, 32, 48, 64, 96):
            assert (extension.linear_slice(K, width, 0, 0) > 0) == (width in native_linear.HEADS and K % 64 == 0)
        for patch, columns in native_linear.COLUMNS.items():
            found = extension.linear_slice(K, 3 * patch**2, patch, 8)
            assert found in (0, columns) and (found > 0) == (K % columns == 0)
            assert extension.linear_slice(K, 3 * patch**2, patch, 6) == 0
    assert [extension.linear_bytes(*sizes) for sizes in ((64, 64), (48, 48), (192, 192))] == [
        4 * native_linear.SLICE * max(native_linear.HEADS), 4 * 48 * 48, 4 * 192 * 192]


def test_sizes_that_vary_are_traced(monkeypatch):
    """The choice asks for sizes, which need not be numbers to `torch.compile`. The GPU is one of little memory."""
    monkeypatch.setattr(dispatch, "why_not_native_cuda", lambda *tensors: None)
    gpu = types.SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def chosen(scm, saet, state, weight, patch):
        return scm + 2.0 * (native_linear.why_not_mhsc(scm, saet) is None) + (
            native_linear.why_not_projection(state, weight, patch) is None)

    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="eager")
    found = set()
    for J, K, D, patch in ((16, 64, 96, 4), (64, 64, 96, 4), (15, 64, 96, 4), (16, 48, 96, 4), (16, 64, 192, 4),
                           (64, 128, 32, 4), (64, 64, 192, 8)):  # fmt: skip
        scm, *given = (torch.randn(shape) for shape in ((2, 3, J, K), (K, D - D % 3), (2, J, D), (3 * patch**2, D)))
        got = compiled(scm, *given, patch)
        assert torch.equal(got, chosen(scm, *given, patch))
        found.add(round(float((got - scm).mean())))
    assert found == {0, 1, 2, 3}
    assert "147,456 bytes" in native_linear.why_not_projection(given[1], given[2], 8)


@pytest.mark.parametrize(("forced", "back"), [(None, "native"), ("triton", "triton"), (None, "triton")])
def test_the_way_back_is_chosen_with_the_way_there(forced, back, monkeypatch):
    """And said to the registered op, whose arguments are what PyTorch's cache of compiled code goes by."""
    said = []
    monkeypatch.setattr(native_linear, "_missing", lambda *given: None if back == "native" else "no GPU")
    monkeypatch.setattr(dispatch.Op, "choose", lambda op, *arguments: "triton")
    monkeypatch.setattr(mhsc_module, "_mhsc", lambda *arguments: said.append(arguments[-1]))
    monkeypatch.setattr(patches_module, "_tokens_to_images", lambda *arguments: said.append(arguments[-1]))
    with use_backend(forced):
        mhsc(torch.randn(1, 3, 16, 64), torch.randn(64, 96))
        tokens_to_images(torch.randn(1, 16, 96), torch.randn(48, 96), torch.randn(48), 3, 4)
    assert said == [back, back]


@pytest.mark.parametrize("scm", [torch.zeros(1, 3, 16, 32), torch.zeros(1, 3, 16, 64).mT.contiguous().mT,
                                 torch.zeros(1, 3, 16, 0), torch.zeros(1, 3, 16, 64, dtype=torch.float64)])
def test_codes_without_a_kernel_are_refused(scm):
    saet = torch.zeros(scm.shape[-1], 96, dtype=scm.dtype)
    with pytest.raises(ValueError, match="does not take"):
        native_linear.mhsc_bwd(torch.zeros(1, 16, 96, dtype=scm.dtype), scm, saet, True, True)


@pytest.mark.parametrize(("J", "D", "patch"), [(16, 32, 4), (16, 0, 4), (9, 96, 4), (16, 96, 2), (16, 96, 8)])
def test_patches_without_a_kernel_are_refused(J, D, patch):
    with pytest.raises(ValueError, match="does not take"):
        native_linear.tokens_to_images_bwd(torch.zeros(1), torch.zeros(1, J, D), torch.zeros(3 * patch**2, D), patch)


gpu = pytest.mark.skipif(not torch.cuda.is_available() or not dispatch.native_cuda(), reason="there is no GPU")


@gpu
@pytest.mark.parametrize(("N", "H", "J", "K", "width"), [*CODES, (300, 3, 64, 64, 32), (20, 4, 256, 256, 48)])
def test_codes_on_the_gpu(N, H, J, K, width, close):
    check_codes(N, H, J, K, width, close, "cuda")


@gpu
@pytest.mark.parametrize(("N", "J", "D", "patch"), [*PATCHES, (300, 64, 96, 4), (50, 64, 192, 4), (20, 256, 192, 8)])
def test_patches_on_the_gpu(N, J, D, patch, close):
    check_patches(N, J, D, patch, close, "cuda")


@gpu
def test_the_ops_take_it(monkeypatch):
    """Where nothing else is insisted on."""
    calls = []
    monkeypatch.setattr(native_linear, "launch", lambda name, *rest, **more: calls.append(name) or
                        native.launch(name, *rest, **more))  # fmt: skip
    scm, saet = torch.randn(2, 3, 64, 64, device="cuda").requires_grad_(), torch.randn(64, 96, device="cuda")
    weight, bias = torch.randn(48, 96, device="cuda"), torch.randn(48, device="cuda")
    for name, count in ((None, 2), ("triton", 0)):
        calls.clear()
        with use_backend(name):
            images = tokens_to_images(mhsc(scm, saet), weight, bias, 3, 4)
        images.sum().backward()
        assert calls.count("linear_backward") == count
