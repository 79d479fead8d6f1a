"""The CUDA kernels of FReeNet's block, on the CPU, a thread at a time, and on a GPU, against float64: the ways products
are computed, both norms, with and without a state, tokens that fill no tile, and more than one chunk."""

from __future__ import annotations

import ctypes
import types

import emulation
import pytest
import torch
from support import built, poisoned_memory

from speedk.ops import BlockWeights, dispatch, freenet_block, native, native_block
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
    products, sums, turn = (emulation.also(block, name) for name in ("row_products", "sum_rows", "in_the_other_order"))

    class Emulated:
        """Stands where speedk._native does."""

        block_tokens = 128
        in_the_other_order = staticmethod(turn)

        @staticmethod
        def FreenetBlock(dtype, tf32, summed, M, width, features, state, weights, eps):
            assert all(address % 16 == 0 for address in (features, state, *weights))
            return dtype, tf32, summed, M, width, features, state, weights, eps

        @staticmethod
        def RowProducts(dtype, tf32, M, left, right):
            assert all(address % 16 == 0 for address in (*left, *right))
            return dtype, tf32, M, left, right

        @staticmethod
        def _block(job, results, backward, size=0, more=False):
            dtype, tf32, summed, M, width, features, state, weights, eps = job
            assert block(dtype, tf32, summed, (ctypes.c_int64 * 2)(M, width), pointers([features, state, *weights]),
                         ctypes.c_double(eps), pointers(results), backward, ctypes.c_int64(size), more)

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
        def sum_rows(dtype, partial, out, rest, rows, size, first, threads):
            assert rest == 0 and first == size
            assert sums(dtype, ctypes.c_void_p(partial), ctypes.c_int64(rows), ctypes.c_int64(size),
                        ctypes.c_void_p(out))

    return Emulated()


@pytest.fixture(params=["", "in the other order"])
def in_its_place(request, emulated, monkeypatch):
    """In two orders of what may come in any: of warps between barriers, and of copies behind their backs."""
    for module in (native, native_block):
        monkeypatch.setattr(module, "native", lambda: emulated)
    monkeypatch.setattr(native_block, "_takes", lambda tensor: None)
    emulated.in_the_other_order(bool(request.param))


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    dtype, tf32, close = PRODUCTS[request.param]
    monkeypatch.setattr(native_block, "tf32_allowed", lambda: tf32)
    return dtype, tf32, close


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
    dtype, _, close = product
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
@pytest.mark.parametrize(("N", "J"), [(0, 31), (1, 1), (1, 16), (5, 31)])
def test_emulated(product, stateful, norm, N, J, in_its_place, monkeypatch):
    monkeypatch.setattr(native_block, "BLOCK_CHUNK", 128)  # two chunks of five images
    check(product, stateful, norm, N, J, "cpu")


def test_a_warp_takes_one_tile_after_another(product, in_its_place):
    dtype, _, close = product
    features, weights = draw(dtype, 1, 400, D), weights_of(dtype)
    got = native_block.freenet_block_fwd(features, None, weights, "branch", EPS)
    want = freenet_block_reference(features.double(), None, BlockWeights(*(w.double() for w in weights)), "branch")
    assert (got.double() - want).norm() <= close * want.norm()


def test_addresses_that_vectors_cannot_be_read_from(product, in_its_place):
    dtype, *_ = product
    weights = weights_of(dtype)
    odd = draw(dtype, 17 * D + 1)[1:].view(1, 17, D)
    got = native_block.freenet_block_fwd(odd, None, weights, "branch", EPS)
    assert torch.equal(got, native_block.freenet_block_fwd(odd.clone(), None, weights, "branch", EPS))


@pytest.mark.skipif(not torch.cuda.is_available() or not dispatch.native_cuda(), reason="there is no GPU")
@NORMS
@pytest.mark.parametrize(("N", "J"), [(1, 1), (1, 128), (3, 50), (700, 49)])
def test_on_the_gpu(product, stateful, norm, N, J):
    check(product, stateful, norm, N, J, "cuda")


def test_each_vector_has_a_gradient_of_its_own(product, in_its_place):
    """Not only their norm together: one by one."""
    dtype, _, close = product
    features, state, d_out = (draw(dtype, 2, 17, D) for _ in range(3))
    weights = weights_of(dtype)
    *_, got = native_block.freenet_block_bwd(d_out, features, state, weights, "branch", EPS)
    *_, want = in_double(d_out, features, state, weights, "branch")
    assert ((got.double() - want).norm(dim=1) <= 2 * close * want.norm(dim=1)).all()


def test_a_nan_stays_in_its_token(product, in_its_place):
    dtype, *_ = product
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
    dtype, _, close = product
    left, right = draw(dtype, tokens, D), draw(dtype, tokens, D)
    job = native.DTYPES[dtype], native_block.tf32_allowed(), tokens, [left.data_ptr()], [right.data_ptr()]
    partial = torch.full((splits, D, D), torch.nan)
    for more in (False, True):
        emulated.row_products(job, partial.data_ptr(), splits, more, 1)
    want = 2 * left.double().T @ right.double()
    assert (partial.double().sum(0) - want).norm() <= close * want.norm()


@pytest.mark.parametrize("product", ["tf32"], indirect=True)
def test_what_tf32_cuts_off_is_made_up_for(product, emulated, in_its_place):
    """Of products of positive numbers, all of which would come out too small."""
    left, right = (torch.rand(64, D) + 0.5 for _ in range(2))
    partial = torch.empty(1, D, D)
    job = emulated.RowProducts(0, True, 64, [left.data_ptr()], [right.data_ptr()])
    emulated.row_products(job, partial.data_ptr(), 1, False, 1)
    want = left.double().T @ right.double()
    assert abs(((partial[0].double() - want) / want).mean()) < 2e-4  # 7e-4 otherwise


@pytest.mark.parametrize("product", ["tf32"], indirect=True)
def test_what_tf32_cuts_off_of_tokens_and_weights_is_made_up_for(product, in_its_place):
    """Of a gradient that has been through six products, which would come out too short."""
    features, d_out, weights = draw(torch.float32, 1, 64, D), draw(torch.float32, 1, 64, D), weights_of(torch.float32)
    got, *_ = native_block.freenet_block_bwd(d_out, features, None, weights, "branch", EPS)
    _, want, *_ = in_double(d_out, features, None, weights, "branch")
    assert abs((got.double() * want).sum() / want.square().sum() - 1) < 4e-5  # 9e-5 for one of both, 2e-4 for none


@built
def test_where_there_is_no_kernel_for_a_gpu(monkeypatch):
    """Too little shared memory for float32 (99 KB), or no tensor cores for these types."""
    gpu = types.SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert native_block.why_not(torch.bfloat16, 0) is None
    assert "134,784 bytes of shared memory, this GPU has 101,376" in native_block.why_not(torch.float32, 0)
    assert "float64" in native_block.why_not(torch.float64, 0)
    gpu.shared_memory_per_block_optin = 232_448
    assert native_block.why_not(torch.float32, 0) is None


@built
def test_a_width_that_varies_is_traced(monkeypatch):
    """The choice asks for D, which need not be a number to `torch.compile`."""
    monkeypatch.setattr(dispatch, "why_not_native_cuda", lambda *tensors: None)
    monkeypatch.setattr(native_block, "width", lambda: 0)  # so that PyTorch computes here

    def block(x, *weights):
        return freenet_block(x, None, BlockWeights(*weights))

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    for width in (64, 96):
        weights = [torch.randn(*((width,) * (2 if "weight" in name and "norm" not in name else 1)))
                   for name in BlockWeights._fields]  # fmt: skip
        x = torch.randn(2, 3, width)
        torch.testing.assert_close(compiled(x, *weights), block(x, *weights))


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_what_pytorch_allows_is_what_is_computed(asked):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        assert native_block.tf32_allowed() == (asked == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_backend_without_a_kernel_is_refused():
    arguments = torch.randn(1, 2, D), None, weights_of(torch.float32), "sum"
    with pytest.raises(ValueError, match="backend='torch'"):
        torch.ops.speedk.freenet_block(*arguments, "torch")
    if dispatch.native() is not None:
        with pytest.raises(ValueError, match="for the GPU, a tensor is on cpu"):
            torch.ops.speedk.freenet_block(*arguments, "native")
