"""The Triton kernels of coo_decode and mhsc_coo, against float64."""

from __future__ import annotations

import forms
import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import DEVICE, gradients, randn

from speedk.kernels import coo

SHAPES = [  # N, H, J, K, k, D
    (3, 2, 64, 16, 48, 32),  # a recipe's: CIFAR-10, 1 image per class
    (1, 2, 256, 256, 40, 12),
    (2, 3, 7, 11, 77, 9),  # every element is an entry
    (2, 1, 5, 300, 20, 130),  # 16-bit indices, a head wider than a block
    (2, 1, 1, 1, 1, 1),
    (2, 2, 5, 4, 0, 4),
    (0, 2, 5, 4, 3, 4),
]


KINDS = [(torch.float32, "sorted"), (torch.float32, "mixed"), (torch.float32, "repeated"), (torch.float16, "sorted"),
         (torch.bfloat16, "repeated")]  # fmt: skip


def entries(N, H, J, K, k, dtype=torch.float32, seed=0, order="sorted"):
    """k distinct coordinates of each matrix in order ("sorted"), in any order ("mixed"), or repeated ("repeated")."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(N, H, J * K, generator=generator).argsort(-1)[..., :k]
    if order == "sorted":
        flat = flat.sort(-1).values
    if order == "repeated":
        flat = flat[..., torch.randint(max(1, k // 2), (k,), generator=generator)]
    index = torch.uint8 if max(J, K) <= 256 else torch.uint16
    values = torch.randn(N, H, k, generator=generator).to(DEVICE, dtype)
    return values, (flat // K).to(DEVICE, index), (flat % K).to(DEVICE, index)


@pytest.mark.parametrize("index", [torch.uint8, torch.uint16, torch.int32, torch.int64], ids=str)
def test_indices_of_any_strides(index):
    """Stored entry first: dense, so that narrowing alone keeps the order that they have in memory."""
    N, H, J, K, k, D = 3, 2, 7, 11, 20, 12
    values, *plain = entries(N, H, J, K, k)
    turned = [t.to(index).permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in plain]
    saet, d_out, d_dense = randn(K, D), randn(N, J, D, seed=1), randn(N, H, J, K, seed=2)
    for run in (lambda *at: coo.coo_decode_fwd(values, *at, J, K)[0], lambda *at: coo.coo_decode_bwd(d_dense, *at),
                lambda *at: coo.mhsc_coo_fwd(values, *at, saet, J)[0],
                lambda *at: torch.cat([t.flatten() for t in coo.mhsc_coo_bwd(d_out, values, *at, saet)])):
        assert torch.equal(run(*turned), run(*plain))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "order"), KINDS)
def test_decode(shape, dtype, order):
    N, H, J, K, k, _ = shape
    values, rows, cols = entries(N, H, J, K, k, dtype, order=order)
    with poisoned_memory():
        got, bad = coo.coo_decode_fwd(values, rows, cols, J, K)
    exact = forms.coo_decode(values.double(), rows, cols, J, K)
    assert_matches("decode", got, exact.to(dtype), exact)
    assert not bad.item()
    with poisoned_memory():
        unchecked, bad = coo.coo_decode_fwd(values, rows, cols, J, K, check=False)
    assert torch.equal(unchecked, got) and bad is None
    d_dense = randn(N, H, J, K, dtype=dtype, seed=3, layout="transposed")
    with poisoned_memory():
        d_values = coo.coo_decode_bwd(d_dense, rows, cols)
    want = d_dense.flatten(2).gather(-1, rows.long() * K + cols.long())
    assert torch.equal(d_values, want)


def sparse(values, saet, rows, cols, J):
    return forms.mhsc_coo(values, rows, cols, saet, J)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "order"), KINDS)
def test_mhsc(shape, dtype, order):
    N, H, J, K, k, D = shape
    values, rows, cols = entries(N, H, J, K, k, dtype, order=order)
    saet, d_out = randn(K, D, dtype=dtype, seed=1, layout="transposed"), randn(N, J, D, dtype=dtype, seed=2)
    with poisoned_memory():
        got, bad = coo.mhsc_coo_fwd(values, rows, cols, saet, J)
        d_values, d_saet = coo.mhsc_coo_bwd(d_out, values, rows, cols, saet)
    wide = values.double(), saet.double()
    assert_matches("out", got, sparse(values, saet, rows, cols, J), sparse(*wide, rows, cols, J))
    assert not bad.item()
    want = gradients(lambda v, s: sparse(v, s, rows, cols, J), values, saet, cotangent=d_out)
    want64 = gradients(lambda v, s: sparse(v, s, rows, cols, J), *wide, cotangent=d_out.double())
    assert_matches("d_values", d_values, want[0], want64[0])
    assert_matches("d_saet", d_saet, want[1], want64[1])
    expanded = randn(N, J, D, dtype=dtype, seed=2, layout="expanded") if N else d_out
    assert torch.equal(coo.mhsc_coo_bwd(expanded, values, rows, cols, saet, need_saet=False)[0],
                       coo.mhsc_coo_bwd(expanded.contiguous(), values, rows, cols, saet)[0])  # fmt: skip


@pytest.mark.parametrize("index", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize(("row", "col"), [(4, 0), (0, 3), (255, 255), (-1, 0), (0, -1), (2**33, 0)], ids=str)
def test_an_index_out_of_range(index, row, col):
    """The entry is left out, the others are not, and the flag is raised."""
    if not torch.iinfo(index).min <= min(row, col) <= max(row, col) <= torch.iinfo(index).max:
        pytest.skip(f"{index} cannot hold ({row}, {col})")
    values = randn(1, 1, 3)
    rows = torch.tensor([[[1, row, 2]]]).to(DEVICE, index)
    cols = torch.tensor([[[1, col, 2]]]).to(DEVICE, index)
    want = torch.zeros(1, 1, 4, 3, device=DEVICE)
    want[0, 0, 1, 1], want[0, 0, 2, 2] = values[0, 0, 0], values[0, 0, 2]
    got, bad = coo.coo_decode_fwd(values, rows, cols, 4, 3)
    assert torch.equal(got, want) and bad.item() == 1
    saet = randn(3, 5)
    assert torch.equal(coo.coo_decode_fwd(values, rows, cols, 4, 3, check=False)[0], want)
    got, bad = coo.mhsc_coo_fwd(values, rows, cols, saet, 4)
    torch.testing.assert_close(got, forms.mhsc(want, saet))
    assert bad.item() == 1
    assert coo.coo_decode_bwd(torch.ones(1, 1, 4, 3, device=DEVICE), rows, cols).tolist() == [[[1, 0, 1]]]
    d_values, d_saet = coo.mhsc_coo_bwd(torch.ones(1, 4, 5, device=DEVICE), values, rows, cols, saet)
    assert d_values[0, 0, 1] == 0
    torch.testing.assert_close(d_saet, want.sum((0, 1, 2))[:, None].expand(3, 5))


def test_images_shared_among_programs(monkeypatch):
    monkeypatch.setattr(coo, "SPLIT_PROGRAMS", 4)
    values, rows, cols = entries(7, 2, 6, 70, 100)
    saet, d_out = randn(70, 8, seed=1), randn(7, 6, 8, seed=2)
    exact = gradients(lambda s: sparse(values.double(), s, rows, cols, 6), saet.double(), cotangent=d_out.double())
    library = gradients(lambda s: sparse(values, s, rows, cols, 6), saet, cotangent=d_out)
    assert_matches("d_saet", coo.mhsc_coo_bwd(d_out, values, rows, cols, saet)[1], library[0], exact[0])
