"""The CUDA ops once at awkward sizes, small enough for compute-sanitizer; results are compared with PyTorch's."""

import torch

from speedk.ops import coo_encode, norm_act_pool, sparsify, topk_mask, use_backend
from speedk.ops.norm_act_pool import norm_act_pool_reference
from speedk.ops.topk import topk_mask_reference

SIZES = [(2, 3, 7, 11, 5), (1, 1, 1, 1, 1), (2, 1, 31, 37, 1146), (1, 1, 2, 300, 3), (2, 2, 3, 5, 0)]

for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for n, h, j, tokens, k in SIZES:
        scm = (2 * torch.randn(n, h, j, tokens, device="cuda")).round().to(dtype)
        want = topk_mask_reference(scm, k)
        with use_backend("native"):
            assert torch.equal(topk_mask(scm, k), want)
            assert torch.equal(sparsify(scm, k), torch.where(want, scm, 0))
            values, rows, cols = coo_encode(scm, k)
        at = want.flatten(2).nonzero()[:, 2].view(n, h, k)
        assert torch.equal(rows.long() * tokens + cols.long(), at)
        assert torch.equal(values, scm.flatten(2).gather(-1, at))

for shape in [(1, 35, 6, 6), (2, 33, 7, 5), (1, 3, 33, 34), (1, 2, 37, 41)]:
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for function in (norm_act_pool, lambda *t: norm_act_pool_reference(*t, 1e-5)):
            torch.manual_seed(0)
            leaves = [torch.randn(size, device="cuda", dtype=torch.float64) for size in (shape, shape[1], shape[1])]
            leaves[0] = leaves[0].contiguous(memory_format=layout)
            leaves = [t.requires_grad_() for t in leaves]
            out = function(*leaves)
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            results.append([out, *first, *torch.autograd.grad(sum(t.sin().sum() for t in first), leaves[:2])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
print("the CUDA ops agree with PyTorch")
