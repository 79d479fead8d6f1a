"""The CUDA ops once at awkward sizes in every dtype, small enough for compute-sanitizer. What is exact or in float64 is
compared with PyTorch's result, the rest must be finite: how close it comes is for tests/ops to say."""

import itertools
import os

# Each tensor an allocation of its own, so that an access beside it is seen.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from speedk.ops import (
    BlockWeights,
    coo_encode,
    freenet_block,
    mhsc,
    native_block,
    norm_act_pool,
    sparsify,
    tokens_to_images,
    topk_mask,
    unroll_step,
    unroll_step_adjoint,
    use_backend,
)
from speedk.ops.freenet_block import NORMS
from speedk.ops.native import DTYPES
from speedk.ops.norm_act_pool import norm_act_pool_reference
from speedk.ops.topk import topk_mask_reference
from speedk.ops.unroll_step import unroll_step_adjoint_reference, unroll_step_reference

SIZES = [  # N, H, J, K, k: one element, odd rows, ties, indices of 16 bits, nothing kept, the last position kept, and
    # rows that fit a block's registers, with more candidates than there is room for and without
    (2, 3, 7, 11, 5), (1, 1, 1, 1, 1), (2, 1, 31, 37, 1146), (1, 1, 2, 300, 3), (2, 2, 3, 5, 0), (1, 1, 1, 513, 513),
    (1, 2, 64, 64, 48), (2, 3, 8, 40, 12),
]  # fmt: skip
PLANES = [(1, 35, 6, 6), (2, 33, 7, 5), (1, 1, 2, 2), (1, 3, 33, 34), (1, 2, 37, 41)]
LENGTHS = [1, 31, 257, 4097, 12_289]


def topk(size: tuple[int, ...], dtype: torch.dtype) -> None:
    n, h, j, tokens, k = size
    scm = (2 * torch.randn(n, h, j, tokens, device="cuda")).round().to(dtype)
    want = topk_mask_reference(scm, k)
    assert torch.equal(topk_mask(scm, k), want)
    assert torch.equal(sparsify(scm, k), torch.where(want, scm, 0))
    values, rows, cols = coo_encode(scm, k)
    at = want.flatten(2).nonzero()[:, 2].view(n, h, k)
    assert torch.equal(rows.long() * tokens + cols.long(), at)
    assert torch.equal(values, scm.flatten(2).gather(-1, at))


def pooling(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    given = [torch.randn(size, device="cuda").to(dtype) for size in (shape, shape[1], shape[1])]

    def derivatives(function):
        leaves = [given[0].contiguous(memory_format=layout), *given[1:]]
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
        out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(t.sin().sum() for t in first), leaves[:2])]

    got = derivatives(norm_act_pool)
    assert all(t.isfinite().all() for t in got)
    if dtype == torch.float64:
        for one, other in zip(got, derivatives(lambda *t: norm_act_pool_reference(*t, 1e-5)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def steps(size: int, dtype: torch.dtype) -> None:
    vectors = [torch.randn(size, device="cuda", dtype=dtype) for _ in range(3)]
    lr = torch.tensor(0.1, device="cuda", dtype=dtype)
    for got, want in (
        (unroll_step(*vectors, lr, 0.9), unroll_step_reference(*vectors, lr, 0.9)),
        (unroll_step_adjoint(*vectors, lr, 0.9), unroll_step_adjoint_reference(*vectors, lr, 0.9)),
        (unroll_step_adjoint(*vectors[:2], None, lr, 0.9), unroll_step_adjoint_reference(*vectors[:2], None, lr, 0.9)),
    ):
        for one, other in zip(got, want, strict=True):
            assert one.isfinite().all()
            if dtype == torch.float64:
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-9)


def blocks(tokens: int, norm: str, dtype: torch.dtype) -> None:
    shapes = [(96, 96) if "weight" in name and "norm" not in name else (96,) for name in BlockWeights._fields]
    features, state, *weights = (torch.randn(shape, device="cuda").to(dtype).requires_grad_()
                                 for shape in [(1, tokens, 96)] * 2 + shapes)
    out = freenet_block(features, state, BlockWeights(*weights), norm)
    found = torch.autograd.grad(out.square().sum(), [features, state, *weights])
    assert all(t.isfinite().all() for t in (out, *found))


def linears(width: int, parts: int, patch: int) -> None:
    """Through the kernel that goes back alone, whose forward passes are Triton's."""
    L, D = 3 * patch**2, parts * width
    scm, saet, weight, bias = (torch.randn(shape, device="cuda", requires_grad=True)
                               for shape in ((3, parts, 16, 128), (128, D), (L, D), (L,)))
    tokens = mhsc(scm, saet)
    images = tokens_to_images(tokens, weight, bias, 3, patch)
    found = torch.autograd.grad(images.square().sum(), [scm, saet, weight, bias])
    assert all(t.isfinite().all() for t in found)


if __name__ == "__main__":
    torch.manual_seed(0)
    with use_backend("native"):
        for dtype in DTYPES:
            for size in SIZES:
                topk(size, dtype)
            for shape, layout in itertools.product(PLANES, (torch.contiguous_format, torch.channels_last)):
                pooling(shape, layout, dtype)
        for dtype, size in itertools.product((torch.float32, torch.float64), LENGTHS):
            steps(size, dtype)
        native_block.BLOCK_CHUNK = native_block.native().block_tokens  # more than one
        for dtype, tf32 in zip((*native_block.DTYPES_OF_BLOCK, torch.float32), (False, False, False, True)):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for tokens, norm in itertools.product((1, 150), NORMS):
                blocks(tokens, norm, dtype)
    for tf32, sizes in itertools.product((False, True), ((32, 3, 4), (48, 2, 4), (64, 3, 4), (48, 4, 8))):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        linears(*sizes)
    print("the CUDA ops agree with PyTorch")
