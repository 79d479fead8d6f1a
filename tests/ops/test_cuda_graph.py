"""The ops in a CUDA graph: nothing in them waits for the GPU, and a replay sees new values."""

from __future__ import annotations

import pytest
import torch

from speedk.ops import coo_decode, coo_encode, mhsc, sparsify, topk_mask, unroll_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_capture_and_replay():
    scm, saet = torch.randn(3, 2, 16, 8, device="cuda"), torch.randn(8, 12, device="cuda")
    theta, lr = torch.randn(3, 100, device="cuda"), torch.tensor(0.1, device="cuda")

    def step():
        stored = coo_encode(scm, 9)
        return (coo_decode(*stored, 16, 8), mhsc(sparsify(scm, 9), saet), topk_mask(scm, 9),
                *unroll_step(*theta, lr, 0.9))  # fmt: skip

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()  # what is compiled or looked up at the first call
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in (scm, theta):
        tensor.normal_()
    graph.replay()
    for one, other in zip(got, step(), strict=True):
        assert torch.equal(one, other)
