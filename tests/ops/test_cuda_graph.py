"""The ops and their gradients in a CUDA graph: nothing in them waits for the GPU, and a replay sees new values."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from speedk import ops
from speedk.ops import BlockWeights, FReeNetWeights, native_block

DEVICE = "cuda"
C, SIDE = 3, 4


class Sizes(NamedTuple):
    N: int
    H: int
    K: int
    D: int
    P: int
    J: int = SIDE**2


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def block(D: int) -> BlockWeights:
    return BlockWeights(*(draw(D, D) * D**-0.5 if i in (0, 4, 6) else draw(D) for i in range(10)))


def inputs(of: Sizes) -> tuple[list[torch.Tensor], FReeNetWeights]:
    """Leaves of every op, which include those of the decoder, and the decoder."""
    L = of.P**2 * C
    with torch.no_grad():
        blocks = (block(of.D), block(of.D))
        flat = [t.requires_grad_() for t in (*(weight for b in blocks for weight in b), draw(L, of.D) * 0.1, draw(L))]
    net = FReeNetWeights(blocks, *flat[-2:], C, of.P, of.J)
    side = SIDE * of.P
    return [draw(of.N, of.H, of.J, of.K), draw(of.K, of.D), draw(of.N, of.J, of.D), draw(of.N, C, side, side),
            *(draw(100) for _ in range(3)), *flat], net  # fmt: skip


def forward(leaves: list[torch.Tensor], net: FReeNetWeights, lr: torch.Tensor) -> list[torch.Tensor]:
    scm, saet, state, images, *rest = leaves
    J, K, P = *scm.shape[2:], net.patch
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
@pytest.mark.parametrize("of", [Sizes(3, 2, 8, 12, 2), Sizes(20, 3, 64, 96, 4)], ids=["Triton", "CUDA"])
def test_capture_and_replay(of, monkeypatch):
    """At sizes that no CUDA kernel of the decoder is for, and at those of all of them, in more chunks than one."""
    monkeypatch.setattr(native_block, "BLOCK_CHUNK", 128)
    given = *inputs(of), torch.tensor(0.1, device=DEVICE)
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
