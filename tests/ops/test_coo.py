"""coo_encode, coo_decode and mhsc_coo on every backend: the definition, 8- and 16-bit indices, refusals."""

from __future__ import annotations

import forms
import pytest
import torch
from support import DEVICES, FLOATS, LAYOUTS, assert_matches, built, compiles, on_backends, poisoned_memory, strided

from speedk.ops import coo, coo_decode, coo_encode, index_dtype, mhsc_coo, sparsify, use_backend

SHAPES = [  # N, H, J, K, k, D
    (3, 2, 64, 16, 48, 32),  # CIFAR-10, 1 image per class
    (2, 4, 256, 256, 192, 192),  # K J = 65,536: the ImageNet subsets
    (2, 3, 7, 11, 77, 9),  # every element is an entry
    (2, 1, 5, 300, 20, 130),  # 16-bit indices
    (20, 1, 3, 4, 2, 5),  # more images than partial sums
    (2, 1, 1, 1, 1, 1),
    (2, 2, 5, 4, 0, 4),
    (0, 2, 5, 4, 3, 4),
]


def entries(N, H, J, K, k, dtype=torch.float32, order="sorted"):
    """k distinct coordinates of each matrix in order ("sorted"), in any order ("mixed"), or repeated ("repeated")."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(N, H, J * K, generator=generator).argsort(-1)[..., :k]
    if order == "sorted":
        flat = flat.sort(-1).values
    if order == "repeated":
        flat = flat[..., torch.randint(max(1, k // 2), (k,), generator=generator)]
    index = index_dtype(max(J, K))
    return torch.randn(N, H, k, generator=generator).to(dtype), (flat // K).to(index), (flat % K).to(index)


def dense_by_loops(values, rows, cols, J, K):
    n, h = values.shape[:2]
    dense = torch.zeros(n, h, J, K, dtype=torch.float64)
    for i in range(n):
        for j in range(h):
            for v, r, c in zip(values[i, j].tolist(), rows[i, j].tolist(), cols[i, j].tolist()):
                dense[i, j, r, c] += v
    return dense


def features_by_loops(values, rows, cols, saet, J):
    return forms.mhsc(dense_by_loops(values, rows, cols, J, saet.shape[0]), saet.double())


@on_backends("coo_encode", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encode(shape, dtype, device, backend):
    n, h, j, tokens, k, _ = shape
    scm = torch.randn(n, h, j, tokens).to(dtype)
    with use_backend(backend), poisoned_memory():
        values, rows, cols = (t.cpu() for t in coo_encode(scm.to(device), k))
    assert rows.dtype == cols.dtype == (torch.uint8 if max(j, tokens) <= 256 else torch.uint16)
    position = rows.long() * tokens + cols.long()
    assert (position.diff() > 0).all(), "entries are in order of j K + k, each once"
    assert torch.equal(dense_by_loops(values, rows, cols, j, tokens), sparsify(scm, k).double())


@on_backends("coo_encode", DEVICES)
def test_encode_refuses_a_nan_or_ranks_it_last(device, backend):
    scm = torch.randn(2, 2, 7, 11, device=device)
    scm[1, 0, 3, 4] = torch.nan
    with use_backend(backend):
        for k in (0, 5, 77):
            with pytest.raises(ValueError, match="NaN"):
                coo_encode(scm, k)
        values, rows, cols = coo_encode(scm, 76, check=False)
    assert torch.isfinite(values).all()
    assert not ((rows == 3) & (cols == 4))[1, 0].any()


@on_backends("coo_decode", DEVICES)
@pytest.mark.parametrize("order", ["sorted", "mixed", "repeated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decode(shape, dtype, order, device, backend):
    n, h, j, tokens, k, _ = shape
    stored = entries(n, h, j, tokens, k, dtype, order)
    exact = dense_by_loops(*stored, j, tokens)
    with use_backend(backend), poisoned_memory():
        got = coo_decode(*(t.to(device) for t in stored), j, tokens).cpu()
    assert_matches("decode", got, forms.coo_decode(*stored, j, tokens), exact)


@on_backends("mhsc_coo", DEVICES)
@pytest.mark.parametrize("order", ["sorted", "mixed", "repeated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mhsc_coo(shape, dtype, order, device, backend):
    n, h, j, tokens, k, d = shape
    values, rows, cols = entries(n, h, j, tokens, k, dtype, order)
    saet, d_out = torch.randn(tokens, d, dtype=dtype), torch.randn(n, j, d, dtype=dtype)

    def run(function, dtype, device="cpu"):
        v, s = (t.to(device, dtype, copy=True).requires_grad_() for t in (values, saet))
        out = function(v, rows.to(device), cols.to(device), s, j)
        return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, (v, s), d_out.to(device, dtype)))]

    with use_backend(backend), poisoned_memory():
        got = run(mhsc_coo, dtype, device)
    library, exact = run(forms.mhsc_coo, dtype, device), run(forms.mhsc_coo, torch.float64)
    exact[0] = features_by_loops(values, rows, cols, saet, j)
    for name, *triple in zip(("features", "d_values", "d_saet"), got, library, exact):
        assert_matches(name, *triple)


@on_backends("mhsc_coo")
def test_the_same_bits_on_any_number_of_threads(backend):
    values, rows, cols = entries(40, 2, 16, 8, 20)
    saet = torch.randn(8, 12, requires_grad=True)
    found = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with use_backend(backend):
                (grad,) = torch.autograd.grad(mhsc_coo(values, rows, cols, saet, 16).square().sum(), saet)
            found.add(grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert backend == "torch" or len(found) == 1


@on_backends("coo_decode")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    values, rows, cols = (strided(t, layout) for t in entries(3, 2, 9, 20, 30))
    rows, cols = rows.to(torch.uint8), cols.to(torch.uint8)
    with use_backend(backend):
        exact = dense_by_loops(values, rows, cols, 9, 20)
        assert torch.allclose(coo_decode(values, rows, cols, 9, 20).double(), exact)
        saet = strided(torch.randn(20, 12), layout)
        assert torch.allclose(mhsc_coo(values, rows, cols, saet, 9).double(),
                              features_by_loops(values, rows, cols, saet, 9), atol=1e-5)  # fmt: skip


@on_backends("coo_decode", DEVICES)
@pytest.mark.parametrize(("size", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.uint16),
                                             (65536, torch.uint16)])  # fmt: skip
def test_index_limits(size, dtype, device, backend):
    assert index_dtype(size) == dtype
    for rows_at_limit in (True, False):
        j, k = (size, 2) if rows_at_limit else (2, size)
        scm = torch.zeros(1, 1, j, k)
        scm[..., -1, -1], scm[..., 0, 0] = 2.0, 1.0
        stored = coo_encode(scm, 2)
        assert stored[1].dtype == dtype
        assert stored[1].flatten().tolist() == [0, j - 1] and stored[2].flatten().tolist() == [0, k - 1]
        stored = [t.to(device) for t in stored]
        with use_backend(backend):
            assert torch.equal(coo_decode(*stored, j, k).cpu(), scm)
            for short in ((j - 1, k), (j, k - 1)):
                with pytest.raises(ValueError, match=rf"J={short[0]} and cols below K={short[1]}"):
                    coo_decode(*stored, *short, check=True)
                left = coo_decode(*stored, *short, check=False).cpu()
                assert left[..., 0, 0].item() == 1 and left.abs().sum() == 1


@on_backends("mhsc_coo")
def test_out_of_range_is_left_out_or_refused(backend):
    values, rows, cols = entries(3, 2, 9, 20, 30)
    rows[0, 0, 3], cols[2, 1, 29] = 9, 255
    kept = values.clone()
    kept[0, 0, 3] = kept[2, 1, 29] = 0
    inside = rows.clamp(max=8), cols.clamp(max=19)
    saet, values = torch.randn(20, 12, requires_grad=True), values.requires_grad_()
    with use_backend(backend):
        for refused in (lambda: mhsc_coo(values, rows, cols, saet, 9), lambda: coo_decode(values, rows, cols, 9, 20)):
            with pytest.raises(ValueError, match="out of range"):
                refused()
        got = mhsc_coo(values, rows, cols, saet, 9, check=False)
        grads = torch.autograd.grad(got.square().sum(), (values, saet))
        (d_values,) = torch.autograd.grad(coo_decode(values, rows, cols, 9, 20, check=False).square().sum(), values)
    kept.requires_grad_()
    want = forms.mhsc_coo(kept, *inside, saet, 9)
    want_grads = torch.autograd.grad(want.square().sum(), (kept, saet))
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(grads[1], want_grads[1], atol=1e-4)
    for grad in (grads[0], d_values):
        assert grad[0, 0, 3] == 0 and grad[2, 1, 29] == 0
    assert torch.allclose(d_values, 2 * kept, atol=1e-5)


def test_signed_and_wide_indices():
    values, rows, cols = entries(2, 1, 9, 20, 30)
    want = coo_decode(values, rows, cols, 9, 20)
    assert torch.equal(coo_decode(values, rows.long(), cols.int(), 9, 20), want)
    rows = rows.long()
    rows[0, 0, 0] = -1
    with pytest.raises(ValueError, match="out of range"):
        coo_decode(values, rows, cols, 9, 20)


def test_refusals():
    values, rows, cols = entries(2, 2, 4, 4, 3)
    saet = torch.randn(4, 6)
    for message, call in {
        r"rows must be \(2, 2, 3\)": lambda: coo_decode(values, rows[..., :2], cols, 4, 4),
        "cols must be of an integer dtype": lambda: coo_decode(values, rows, cols.float(), 4, 4),
        "values must be of a floating dtype, got torch.int64": lambda: coo_decode(values.long(), rows, cols, 4, 4),
        "J=-1": lambda: coo_decode(values, rows, cols, -1, 4),
        "saet is torch.float64 but values is torch.float32": lambda: mhsc_coo(values, rows, cols, saet.double(), 4),
        "D=5 is not a multiple of H=2": lambda: mhsc_coo(values, rows, cols, torch.randn(4, 5), 4),
        "k=17 is outside": lambda: coo_encode(torch.randn(1, 1, 4, 4), 17),
        "65537 does not fit": lambda: coo_encode(torch.randn(1, 1, 1, 65537), 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@on_backends("coo_decode")
def test_nothing_to_decode_into(backend):
    values, rows, cols = entries(2, 1, 4, 4, 3)
    with use_backend(backend):
        assert coo_decode(values, rows, cols, 0, 4, check=False).shape == (2, 1, 0, 4)
        with pytest.raises(ValueError, match="J=0"):
            coo_decode(values, rows, cols, 0, 4)


@on_backends("mhsc_coo")
def test_gradients(backend):
    values, rows, cols = entries(3, 2, 5, 7, 6, torch.float64, "repeated")
    values.requires_grad_()
    saet = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    scm = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda v, s: mhsc_coo(v, rows, cols, s, 5), (values, saet))
        assert torch.autograd.gradcheck(lambda v: coo_decode(v, rows, cols, 5, 7), values)
        assert torch.autograd.gradgradcheck(lambda v: coo_decode(v, rows, cols, 5, 7), values)
        assert torch.autograd.gradcheck(lambda x: coo_encode(x, 6)[0], scm)
        assert torch.autograd.gradgradcheck(lambda x: coo_encode(x, 6)[0], scm)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    values, rows, cols = entries(3, 2, 9, 8, 12)
    values = strided(values, layout).detach().requires_grad_()
    saet = strided(torch.randn(8, 6), layout).detach().requires_grad_()
    scm = strided(torch.randn(3, 2, 9, 8), layout).detach().requires_grad_()
    d_dense, d_out = strided(torch.randn(3, 2, 9, 8), layout), strided(torch.randn(3, 9, 6), layout)
    torch.library.opcheck(coo._coo_encode, (scm, 7, True, "native"))
    torch.library.opcheck(coo._coo_decode, (values, rows, cols, 9, 8, True, "native"))
    torch.library.opcheck(coo._coo_decode_bwd, (d_dense, rows, cols, "native"))
    torch.library.opcheck(coo._mhsc_coo, (values, rows, cols, saet, 9, True, "native"))
    need = {"plain": (True, False), "transposed": (False, True)}.get(layout, (True, True))
    torch.library.opcheck(coo._mhsc_coo_bwd, (d_out, values.detach(), rows, cols, saet.detach(), *need, "native"))


@on_backends("mhsc_coo")
def test_compile(backend):
    def walk(scm, saet):
        values, rows, cols = coo_encode(scm, 5)
        return coo_decode(values, rows, cols, 8, 6), mhsc_coo(values, rows, cols, saet, 8)

    with use_backend(backend):
        compiles(walk, torch.randn(2, 2, 8, 6), torch.randn(6, 4))


def test_transforms_take_torch():
    values, rows, cols = entries(2, 2, 9, 8, 12, torch.float64)
    saet = torch.randn(8, 6, dtype=torch.float64)
    want = features_by_loops(values, rows, cols, saet, 9)
    _, tangent = torch.func.jvp(lambda s: mhsc_coo(values, rows, cols, s, 9), (saet,), (saet,))
    assert torch.allclose(tangent, want)
    grad = torch.func.grad(lambda v: coo_decode(v, rows, cols, 9, 8).square().sum() / 2)(values)
    assert torch.allclose(grad, values)
    batched = torch.vmap(lambda v: mhsc_coo(v, rows, cols, saet, 9))(torch.stack([values, 2 * values]))
    assert torch.allclose(batched, torch.stack([want, 2 * want]))


def test_round_trip_is_sparse_mhsc():
    scm, saet = torch.randn(3, 2, 16, 8), torch.randn(8, 12)
    got = mhsc_coo(*coo_encode(scm, 9), saet, 16)
    exact = forms.mhsc(sparsify(scm, 9).double(), saet.double())
    assert_matches("features", got, forms.mhsc(sparsify(scm, 9), saet), exact)
