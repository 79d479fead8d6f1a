"""The CUDA kernels of FReeNet's block, on the CPU, a thread at a time, and on a GPU, against float64: the ways products
are computed, both norms, with and without a state, tokens that fill no tile, and more than one chunk."""

from __future__ import annotations

import contextlib
import ctypes

import emulation
import pytest
import torch
from support import poisoned_memory

from speedk.ops import BlockWeights, dispatch, native, native_block
from speedk.ops.freenet_block import EPS, freenet_block_reference

D = 96
PRODUCTS = {  # dtype, tf32 allowed, how far off a result may be, of its length
    "bfloat16": (torch.bfloat16, False, 1e-2),
    "float16": (torch.float16, False, 1.5e-3),
    "tf32": (torch.float32, True, 1.5e-3),
    "float32": (torch.float32, False, 3e-6),
}


def pointers(addresses):
    return (ctypes.c_void_p * len(addresses))(*addresses)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    block = emulation.emulated("freenet_block", tmp_path_factory.mktemp("emulated"))
    products, sums = (emulation.also(block, name) for name in ("row_products", "sum_rows"))

    class Emulated:
        """Stands where speedk._native does."""

        block_tokens = 128
        FreenetBlock = staticmethod(lambda *job: job)
        RowProducts = staticmethod(lambda *job: job)

        @staticmethod
        def _block(job, results, backward, size=0, more=0):
            dtype, tf32, summed, M, width, features, state, weights, eps = job
            assert block(dtype, tf32, summed, (ctypes.c_int64 * 2)(M, width), pointers([features, state, *weights]),
                         ctypes.c_double(eps), pointers(results), backward, ctypes.c_int64(size), ctypes.c_int64(more))

        def freenet_block(self, job, out, threads):
            self._block(job, [out], False)

        def freenet_block_backward(self, job, *rest):
            *results, size, more, _ = rest
            self._block(job, results, True, size, more)

        @staticmethod
        def row_products(job, partial, splits, more, threads):
            dtype, tf32, M, left, right = job
            assert products(dtype, tf32, ctypes.c_int64(M), len(left), pointers(left), pointers(right),
                            ctypes.c_void_p(partial), ctypes.c_int64(splits), more)

        @staticmethod
        def sum_rows(dtype, partial, out, rows, size, threads):
            assert sums(dtype, ctypes.c_void_p(partial), ctypes.c_int64(rows), ctypes.c_int64(size),
                        ctypes.c_void_p(out))

    return Emulated()


@pytest.fixture
def in_its_place(emulated, monkeypatch):
    for module in (native, native_block):
        monkeypatch.setattr(module, "native", lambda: emulated)


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    dtype, tf32, close = PRODUCTS[request.param]
    monkeypatch.setattr(native_block, "tf32_allowed", lambda: tf32)
    return dtype, close


def draw(dtype, *shape, scale=1.0, shift=0.0, device="cpu"):
    return (torch.randn(shape) * scale + shift).to(device, dtype)


def weights_of(dtype, device="cpu"):
    matrices, norms = ("proj_weight", "fc1_weight", "fc2_weight"), ("norm1_weight", "norm2_weight")
    return [draw(dtype, D, D, scale=D**-0.5, device=device) if name in matrices
            else draw(dtype, D, scale=0.3, shift=1.0 if name in norms else 0.0, device=device)
            for name in BlockWeights._fields]  # fmt: skip


def in_double(d_out, features, state, weights, norm):
    """The result, and the gradients as the launcher returns them."""
    given = [features, *weights] if state is None else [features, *weights, state]
    leaves = [t.double().requires_grad_() for t in given]
    out = freenet_block_reference(leaves[0], leaves[11] if state is not None else None, BlockWeights(*leaves[1:11]),
                                  norm)  # fmt: skip
    found = torch.autograd.grad(out, leaves, d_out.double())
    return [out, found[0], None if state is None else found[11], torch.stack([g for g in found[1:11] if g.ndim == 2]),
            torch.stack([g for g in found[1:11] if g.ndim == 1])]  # fmt: skip


def check(product, stateful, norm, N, J, device):
    dtype, close = product
    features, d_out = draw(dtype, N, J, D, device=device), draw(dtype, N, D, J, device=device).mT  # of other strides
    state, weights = draw(dtype, N, J, D, device=device) if stateful else None, weights_of(dtype, device)
    with poisoned_memory():
        out = native_block.freenet_block_fwd(features, state, weights, norm, EPS)
        found = native_block.freenet_block_bwd(d_out, features, state, weights, norm, EPS)
    for got, want in zip((out, *found), in_double(d_out, features, state, weights, norm), strict=True):
        if want is None:
            assert got is None
        else:
            assert got.dtype == dtype and got.shape == want.shape
            assert (got.double() - want).norm() <= close * want.norm()


NORMS = pytest.mark.parametrize(("stateful", "norm"), [(False, "branch"), (True, "branch"), (True, "sum")])


@NORMS
@pytest.mark.parametrize("N", [0, 1, 5])
def test_emulated(product, stateful, norm, N, in_its_place, monkeypatch):
    monkeypatch.setattr(native_block, "BLOCK_CHUNK", 128)  # two chunks of five images
    check(product, stateful, norm, N, 31, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available() or not dispatch.native_cuda(), reason="there is no GPU")
@NORMS
@pytest.mark.parametrize(("N", "J"), [(1, 1), (3, 50), (700, 49)])
def test_on_the_gpu(product, stateful, norm, N, J, monkeypatch):
    monkeypatch.undo()  # what may be computed in tf32 is for PyTorch to say
    dtype, close = product
    with tf32(close == PRODUCTS["tf32"][2] and dtype == torch.float32):
        check(product, stateful, norm, N, J, "cuda")


@contextlib.contextmanager
def tf32(allowed):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_each_vector_has_a_gradient_of_its_own(product, in_its_place):
    """Not only their norm together: one by one."""
    dtype, close = product
    features, state, d_out = (draw(dtype, 2, 17, D) for _ in range(3))
    weights = weights_of(dtype)
    *_, got = native_block.freenet_block_bwd(d_out, features, state, weights, "branch", EPS)
    *_, want = in_double(d_out, features, state, weights, "branch")
    assert ((got.double() - want).norm(dim=1) <= 2 * close * want.norm(dim=1)).all()


def test_a_nan_stays_in_its_token(product, in_its_place):
    dtype, _ = product
    features, d_out, weights = draw(dtype, 1, 40, D), draw(dtype, 1, 40, D), weights_of(dtype)
    features[0, 7, 3] = torch.nan
    out = native_block.freenet_block_fwd(features, None, weights, "branch", EPS)
    d_features, *_ = native_block.freenet_block_bwd(d_out, features, None, weights, "branch", EPS)
    rest = torch.arange(40) != 7
    assert out[0, 7].isnan().all() and out[0, rest].isfinite().all()
    assert d_features[0, 7].isnan().all() and d_features[0, rest].isfinite().all()


@pytest.mark.parametrize(("tokens", "splits"), [(1, 1), (70, 2), (33, 4), (300, 2)])
def test_products_over_tokens(product, emulated, tokens, splits):
    """One alone, and added to what is there; with parts that have no token."""
    dtype, close = product
    left, right = draw(dtype, tokens, D), draw(dtype, tokens, D)
    job = native.DTYPES[dtype], native_block.tf32_allowed(), tokens, [left.data_ptr()], [right.data_ptr()]
    partial = torch.full((splits, D, D), torch.nan)
    for more in (False, True):
        emulated.row_products(job, partial.data_ptr(), splits, more, 1)
    want = 2 * left.double().T @ right.double()
    assert (partial.double().sum(0) - want).norm() <= close * want.norm()
