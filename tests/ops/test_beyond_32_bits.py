"""Tensors of more than 2^31 elements: offsets that do not fit 32 bits. The last image is the one that tells."""

from __future__ import annotations

import pytest
import torch

from speedk.ops import (
    BlockWeights,
    add_layer_norm,
    coo_decode,
    coo_encode,
    dispatch,
    freenet_block,
    mhsc,
    mhsc_coo,
    patchify,
    sparsify,
    tokens_to_images,
    topk_mask,
    unpatchify,
    use_backend,
)

MOST = 24 * 2**30  # bytes: the input, a result, and what a result may be moved through
N, J, D = 2**31 // (32 * 64) + 100, 32, 64


def enough_memory() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < MOST:
        pytest.skip(f"needs a GPU with {MOST >> 30} GiB to spare")


@pytest.fixture
def large():
    """bfloat16 [N, J, D], zero but for the last image."""
    enough_memory()
    x = torch.zeros(N, J, D, dtype=torch.bfloat16, device="cuda")
    x[-1] = randn(J, D)
    yield x
    del x
    torch.cuda.empty_cache()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def same(function, x: torch.Tensor) -> None:
    """The result for the last image among all is, to rounding, that for the last one alone."""
    got, want = (function(images)[-1].double() for images in (x, x[-1:]))
    assert want.any() and (got - want).abs().max() <= 0.01 * want.abs().max()


def test_triton(large):
    square, row = randn(D, D) / 8, randn(D)
    weights = BlockWeights(*(square if i in (0, 4, 6) else row for i in range(10)))
    sixteen = large.view(-1, 16, D)  # a square number of patches
    with use_backend("triton"):
        same(lambda x: add_layer_norm(x, None, row, row), large)
        same(lambda x: add_layer_norm(x, x, row, row), large)
        same(lambda x: mhsc(x[:, None], square), large)
        same(lambda x: freenet_block(x, None, weights), large)
        same(lambda x: freenet_block(x, x, weights), large)
        same(lambda x: patchify(x[:, None], 4), large)
        same(lambda x: unpatchify(x, 1, 8), sixteen)
        same(lambda x: tokens_to_images(x, square, row, 1, 8), sixteen)


def test_triton_from_entries():
    enough_memory()
    values = torch.ones(N, 1, 1, dtype=torch.bfloat16, device="cuda")
    index, tokens = torch.full((N, 1, 1), 31, dtype=torch.uint8, device="cuda"), randn(D, D)
    with use_backend("triton"):
        assert coo_decode(values, index, index, J, D)[-1].nonzero().tolist() == [[0, 31, 31]]
        last = mhsc_coo(values, index, index, tokens, J)[-1]
    assert torch.equal(last[31], tokens[31]) and not last[:31].any()
    torch.cuda.empty_cache()


@pytest.mark.skipif(not dispatch.native_cuda(), reason="the extension is built without its CUDA files")
def test_cuda(large):
    scm = large[:, None]
    with use_backend("native"):
        same(lambda x: sparsify(x, 5), scm)
        same(lambda x: topk_mask(x, 5), scm)
        for got, want in zip(coo_encode(scm, 5), coo_encode(scm[-1:], 5), strict=True):
            assert torch.equal(got[-1], want[0])
