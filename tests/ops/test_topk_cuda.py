"""The CUDA kernel of topk on the CPU, a thread at a time: exactly k, ties to the lowest index, each way it goes."""

from __future__ import annotations

import ctypes

import emulation
import pytest
import torch
from support import FLOATS, poisoned_memory
from test_topk import by_loops

from speedk.ops import coo_encode, dispatch, native, sparsify, topk_mask, use_backend

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the extension is not built")

SHAPES = [  # N, H, J, K, k
    (2, 2, 64, 16, 48),  # CIFAR-10, 1 image per class
    (1, 2, 256, 256, 192),  # K J = 65,536: the ImageNet subsets
    (2, 1, 7, 11, 5),  # rows that begin anywhere
    (1, 1, 1, 1, 1),
    (2, 3, 64, 64, 48),  # CIFAR-10, 10
    (1, 2, 64, 64, 192),  # the most that the bound of a short row serves
    (1, 2, 64, 64, 193),
    (1, 1, 8, 8, 40),  # most threads hold no entry
    (1, 2, 4, 100, 12),
    (1, 2, 64, 64, 512),  # the most that the bound serves
    (1, 2, 30, 40, 384),  # more than threads that hold an entry
    (1, 2, 64, 64, 513),
    (1, 2, 31, 37, 1147),  # everything
    (1, 2, 2, 300, 3),  # indices of 16 bits
    (2, 2, 3, 5, 0),
    (0, 2, 8, 8, 3),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    call = emulation.emulated("topk", tmp_path_factory.mktemp("emulated"))

    class Emulated:
        """Stands where speedk._native does."""

        Topk = staticmethod(lambda *job: job)

        @staticmethod
        def topk(job):
            dtype, scm, rows, J, K, k, dense, mask, values, row_index, col_index, index_bytes, _ = job
            nan = ctypes.c_int(0)
            assert call(dtype, ctypes.c_void_p(scm), (ctypes.c_int64 * 4)(rows, J, K, k),
                        (ctypes.c_void_p * 5)(dense, mask, values, row_index, col_index), index_bytes,
                        ctypes.byref(nan)), "threads wait for others that ended"  # fmt: skip
            return bool(nan.value)

    return Emulated()


@pytest.fixture(autouse=True)
def _in_its_place(emulated, monkeypatch):
    monkeypatch.setattr(native, "native", lambda: emulated)


def check(scm: torch.Tensor, k: int, want: torch.Tensor) -> None:
    with use_backend("native"), poisoned_memory():
        mask, kept, (values, rows, cols) = topk_mask(scm, k), sparsify(scm, k), coo_encode(scm, k)
    assert torch.equal(mask, want)
    assert torch.equal(kept, torch.where(want, scm, 0))
    at = want.flatten(2).nonzero()[:, 2].view(*scm.shape[:2], k)
    assert torch.equal(rows.long() * scm.shape[3] + cols.long(), at)
    assert torch.equal(values, scm.flatten(2).gather(-1, at))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(shape, dtype):
    *size, k = shape
    scm = torch.randn(size).to(dtype)
    ties, same, few = (2 * scm).round(), torch.ones_like(scm), torch.where(scm.abs() > 1.5, scm, 0)
    few.flatten()[::7] = -torch.inf
    for values in (scm, ties, same, few):
        check(values, k, by_loops(values, k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_begin_anywhere_in_memory(dtype):
    for start in range(1, 9):
        scm = torch.randn(2 * 9 * 53 + 8).to(dtype)[start:][:2 * 9 * 53].view(1, 2, 9, 53)
        check(scm, 20, by_loops(scm, 20))


def test_ties_among_the_candidates():
    """More that equal the cut than are kept, all of them gathered."""
    scm = torch.randn(1, 1, 64, 64).clamp(-2, 2)
    assert 60 < (scm.abs() == 2).sum() < 1000
    for k in (1, 48, 60):
        check(scm, k, by_loops(scm, k))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(7, 11), (64, 64)])
def test_nan(size, dtype):
    scm = torch.randn(2, 2, *size).to(dtype)
    scm[1, 0, 3, 4] = torch.nan
    scm[1, 0, 3, 5] = -torch.inf
    with use_backend("native"):
        for op in (topk_mask, sparsify, coo_encode):
            for k in (0, 5, 77):
                with pytest.raises(ValueError, match="NaN"):
                    op(scm, k)
        unchecked = topk_mask(scm, 5, check=False)
    assert torch.equal(unchecked, by_loops(scm.nan_to_num(nan=0, neginf=-torch.inf), 5))
    assert not unchecked[1, 0, 3, 4] and unchecked[1, 0, 3, 5]
