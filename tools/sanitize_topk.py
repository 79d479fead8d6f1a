"""The CUDA ops once at awkward sizes, small enough for compute-sanitizer; results are compared with PyTorch's."""

import torch

from speedk.ops import coo_encode, sparsify, topk_mask, use_backend
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
print("the CUDA ops agree with PyTorch")
