"""The ops and their gradients in a CUDA graph: nothing in them waits for the GPU, and a replay sees new values."""

from __future__ import annotations

import pytest
import torch

from speedk import ops
from speedk.ops import BlockWeights, FReeNetWeights

DEVICE = "cuda"
N, H, J, K, D, C, P = 3, 2, 16, 8, 12, 3, 2


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def block() -> BlockWeights:
    return BlockWeights(*(draw(D, D) if i in (0, 4, 6) else draw(D) for i in range(10)))


def inputs() -> tuple[list[torch.Tensor], FReeNetWeights]:
    """Leaves of every op, which include those of the decoder, and the decoder."""
    net = FReeNetWeights((block(), block()), draw(P * P * C, D), draw(P * P * C), C, P, J)
    flat = [*(weight for b in net.blocks for weight in b), net.weight, net.bias]
    return [draw(N, H, J, K), draw(K, D), draw(N, J, D), draw(N, C, 8, 8), *(draw(100) for _ in range(3)), *flat], net


def forward(leaves: list[torch.Tensor], net: FReeNetWeights, lr: torch.Tensor) -> list[torch.Tensor]:
    scm, saet, state, images, *rest = leaves
    stored = ops.coo_encode(scm, 9)
    features = ops.mhsc(ops.sparsify(scm, 9), saet)
    tokens = ops.patchify(images, P)
    return [
        *stored, ops.topk_mask(scm, 9), ops.coo_decode(*stored, J, K), features, ops.mhsc_coo(*stored, saet, J),
        tokens, ops.unpatchify(2 * tokens, C, P), ops.tokens_to_images(state, net.weight, net.bias, C, P),
        ops.add_layer_norm(features, state, net.blocks[0].norm1_weight, net.blocks[0].norm1_bias),
        ops.freenet_block(features, state, net.blocks[0], "sum"), ops.freenet(scm, saet, net),
        ops.freenet_coo(*stored, saet, net), ops.norm_act_pool(images, net.bias[:C], net.bias[-C:]),
        *ops.unroll_step(*rest[:3], lr, 0.9),
    ]  # fmt: skip


def step(leaves: list[torch.Tensor], net: FReeNetWeights, lr: torch.Tensor) -> list[torch.Tensor]:
    """All results, and the gradients that come back through all of them."""
    out = forward(leaves, net, lr)
    smooth = [tensor for tensor in out if tensor.requires_grad]
    return [*out, *torch.autograd.grad(smooth, leaves, [tensor.detach() for tensor in smooth])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_capture_and_replay():
    given = *inputs(), torch.tensor(0.1, device=DEVICE)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        before = step(*given)  # what is compiled or looked up at the first call
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*given)
    with torch.no_grad():
        for tensor in given[0]:
            tensor.normal_()
    graph.replay()
    for one, new, old in zip(got, step(*given), before, strict=True):
        scale = new.double().abs().max().clamp(min=1)  # of sums that the library's products may take in another order
        assert (one.double() - new.double()).abs().max() <= 1e-4 * scale
        assert not torch.equal(new, old)
