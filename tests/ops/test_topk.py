"""topk_mask and sparsify: exactly k, ties to the lowest index, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS, LAYOUTS, built, compiles, on_backends, poisoned_memory, strided

from speedk.ops import dispatch, explain, sparsify, topk, topk_mask, use_backend

SHAPES = [  # N, H, J, K, k
    (3, 2, 64, 16, 48),  # CIFAR-10, 1 image per class
    (2, 1, 256, 256, 192),  # K J = 65,536: the ImageNet subsets
    (2, 3, 7, 11, 5),
    (1, 1, 1, 1, 1),
    (2, 1, 31, 37, 1147),  # everything
    (2, 1, 31, 37, 1146),
    (2, 1, 64, 64, 2000),  # more than the groups of the native kernel hold
    (5, 1, 1, 257, 1),
    (2, 2, 3, 5, 0),
    (0, 2, 8, 8, 3),
    (2, 0, 8, 8, 3),
    (2, 2, 0, 8, 0),
]


def by_loops(scm: torch.Tensor, k: int) -> torch.Tensor:
    """The definition: sort positions by falling magnitude, then by rising index, and keep the first k."""
    mask = torch.zeros(scm.shape, dtype=torch.bool)
    for n in range(scm.shape[0]):
        for h in range(scm.shape[1]):
            sizes = [abs(v) for v in scm[n, h].flatten().double().tolist()]
            for position in sorted(range(len(sizes)), key=lambda p: (-sizes[p], p))[:k]:
                mask[n, h].view(-1)[position] = True
    return mask


@on_backends("topk_mask", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(shape, dtype, device, backend):
    *size, k = shape
    scm = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for values in (scm, (2 * scm).round(), torch.ones_like(scm), scm.clamp(-0.01, 0.01) * 1e-30):
        want = by_loops(values, k)
        with use_backend(backend), poisoned_memory():
            mask, kept = topk_mask(values.to(device), k).cpu(), sparsify(values.to(device), k).cpu()
        assert torch.equal(mask, want)
        assert torch.equal(kept, torch.where(want, values, torch.zeros((), dtype=dtype)))


@on_backends("topk_mask")
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_few_distinct_values(data, backend):
    j, k_tokens = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(0, j * k_tokens))
    seed, levels = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 5))
    scm = torch.randint(-levels, levels + 1, (2, 1, j, k_tokens), generator=torch.Generator().manual_seed(seed)).float()
    scm[scm == 2] = torch.inf
    with use_backend(backend):
        assert torch.equal(topk_mask(scm, k), by_loops(scm, k))


@on_backends("sparsify")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    scm = strided(torch.randn(3, 2, 9, 20), layout)
    with use_backend(backend):
        assert torch.equal(topk_mask(scm, 7), by_loops(scm, 7))
        assert torch.equal(sparsify(scm, 7), torch.where(by_loops(scm, 7), scm, 0))


@on_backends("sparsify")
def test_unaligned_and_large(backend):
    """A result that starts in the middle of a cache line, and one that is written past the caches."""
    scm = torch.randn(40, 1, 64, 1024)
    want = topk.topk_mask_reference(scm, 100)
    with use_backend(backend):
        assert torch.equal(topk_mask(scm, 100), want)
        assert torch.equal(sparsify(scm, 100), torch.where(want, scm, 0))
        odd = torch.randn(7 * 13 * 3 + 1)[1:].view(3, 1, 7, 13)
        assert torch.equal(sparsify(odd, 9), torch.where(by_loops(odd, 9), odd, 0))


@on_backends("topk_mask", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan(dtype, device, backend):
    scm = torch.randn(2, 2, 7, 11, device=device).to(dtype)
    scm[1, 0, 3, 4] = torch.nan
    scm[1, 0, 3, 5] = -torch.inf
    with use_backend(backend):
        for op in (topk_mask, sparsify):
            for k in (0, 5, 77):
                with pytest.raises(ValueError, match="NaN"):
                    op(scm, k)
        unchecked = topk_mask(scm, 5, check=False)
        assert not unchecked[1, 0, 3, 4] and unchecked[1, 0, 3, 5]
        assert (unchecked.sum((-1, -2)) == 5).all()
        assert torch.equal(unchecked, topk_mask(scm.nan_to_num(nan=0, neginf=-torch.inf), 5))


@pytest.mark.parametrize("op", [topk_mask, sparsify])
def test_refusals(op):
    with pytest.raises(ValueError, match="k=65 is outside 0 to J K=64"):
        op(torch.randn(1, 1, 8, 8), 65)
    with pytest.raises(ValueError, match="k=-1"):
        op(torch.randn(1, 1, 8, 8), -1)
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        op(torch.randn(8, 8), 1)
    with pytest.raises(ValueError, match="int64"):
        op(torch.ones(1, 1, 8, 8, dtype=torch.int64), 1)


@on_backends("sparsify")
def test_gradients(backend):
    scm = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: sparsify(x, 6), scm)
        assert torch.autograd.gradgradcheck(lambda x: sparsify(x, 6), scm)
        zero = torch.zeros(1, 1, 2, 3, requires_grad=True)  # kept entries pass their gradient, whatever their value
        sparsify(zero, 2).sum().backward()
    assert zero.grad.flatten().tolist() == [1, 1, 0, 0, 0, 0]


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for op in (topk._topk_mask, topk._sparsify):
        scm = strided(torch.randn(3, 2, 9, 8), layout).detach()
        scm.requires_grad_(op is topk._sparsify)
        torch.library.opcheck(op, (scm, 7, True, "native"))


@on_backends("sparsify")
def test_compile(backend):
    with use_backend(backend):
        compiles(lambda x: sparsify(x * 2, 5) + topk_mask(x, 5), torch.randn(2, 2, 8, 8))


def test_transforms_take_torch():
    scm = torch.randn(4, 2, 2, 5, 7, dtype=torch.float64)
    mask = topk_mask(scm[0], 6)
    grad = torch.func.grad(lambda x: (sparsify(x, 6) ** 2).sum())(scm[0])
    assert torch.equal(grad, 2 * scm[0] * mask)
    _, tangent = torch.func.jvp(lambda x: sparsify(x, 6), (scm[0],), (torch.ones_like(scm[0]),))
    assert torch.equal(tangent, mask.double())
    batched = torch.vmap(lambda x: sparsify(x, 6))(scm)
    assert torch.equal(batched, torch.stack([sparsify(x, 6) for x in scm]))


@built
def test_larger_matrices_are_left_to_pytorch():
    assert dispatch.native().topk_entries == topk.NATIVE_ENTRIES
    one = torch.zeros(())  # of a single number in memory
    assert "1,073,741,824 entries" in explain("sparsify", one.expand(1, 1, 2**15, 2**15 + 1), 1)["native"]
    assert explain("sparsify", one.expand(1, 1, 2**15, 2**15), 1)["native"] == "chosen"
