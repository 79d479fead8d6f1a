"""The whole decoder: from stored entries without gradients, and in training, with peak memory; and one block of it.

The peer is the straightforward form: the SAETs repeated for each image, E A in each block. `torch.compile` gets the
same function: on a GPU in each case that has a floor for it, on a CPU, where compiling takes long, in one. On a GPU
both sides run in float32, tf32 and bf16.
"""

import pytest
import torch
from cases import DEEP, IN_EACH_PRECISION, LARGE, MANY, MIDDLE, SMALL
from measuring import CUDA, DEVICE, dtype_of, precisions
from torch.nn.functional import gelu, layer_norm, linear

from speedk.ops import freenet, freenet_block, freenet_coo
from speedk.ops.patches import unpatchify_reference


def straightforward_block(features, state, b):
    width = features.shape[-1:]
    hidden = layer_norm(linear(features, b.proj_weight, b.proj_bias), width, b.norm1_weight, b.norm1_bias, 1e-6)
    hidden = hidden if state is None else hidden + state
    inner = gelu(linear(hidden, b.fc1_weight, b.fc1_bias))
    return layer_norm(linear(inner, b.fc2_weight, b.fc2_bias) + hidden, width, b.norm2_weight, b.norm2_bias, 1e-6)


def straightforward(scm, saet, weights):
    n, h, j, k = scm.shape
    state = None
    for b in weights.blocks:
        pools = saet.view(1, k, h, -1).transpose(1, 2).repeat(n, 1, 1, 1)
        state = straightforward_block((scm @ pools).transpose(1, 2).reshape(n, j, -1), state, b)
    return unpatchify_reference(linear(state, weights.weight, weights.bias), weights.channels, weights.patch)


def products(case) -> int:
    """FLOP of a pass forward, E A counted once."""
    tokens = case.N * case.J
    return 2 * tokens * (case.K * case.D + case.R * 3 * case.D**2 + case.D * case.L)


@IN_EACH_PRECISION
@pytest.mark.parametrize("case", [*(MANY if CUDA else ()), MIDDLE, LARGE], ids=lambda c: c.name)
def bench_freenet_coo(contest, case, precision):
    stored, saet, weights = case.entries(precision), case.saet(precision), case.weights(precision)

    def dense():
        at = stored[1].long() * case.K + stored[2].long()
        scm = stored[0].new_zeros(case.N, case.H, case.J * case.K).scatter_(-1, at, stored[0])
        return straightforward(scm.view(case.N, case.H, case.J, case.K), saet, weights)

    with torch.no_grad():
        contest("freenet_coo", case.name, {"speedk": lambda: freenet_coo(*stored, saet, weights, check=False)},
                {"dense, eager": dense}, flops=products(case) - 2 * case.N * case.J * case.K * case.D, memory=True,
                precision=precision, items=case.N)


def compiled_too(case, precision) -> bool:
    return precision != "float32" if CUDA else case.name == MIDDLE.name


def compiled(function):
    torch._dynamo.reset()  # a compilation of its own for each case, not one for shapes that change
    return torch.compile(function)


FAST_FIRST = pytest.mark.parametrize("precision", precisions()[::-1])  # time may run out


@FAST_FIRST
@pytest.mark.parametrize("case", [SMALL, MIDDLE, DEEP, LARGE], ids=lambda c: c.name)
def bench_freenet_training(contest, case, precision):
    weights = case.weights(precision)
    flat = [t for block in weights.blocks for t in block] + [weights.weight, weights.bias]
    leaves = [t.requires_grad_() for t in (case.scm(precision), case.saet(precision), *flat)]
    d_images = case.images(precision)

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves[:2], weights), leaves, d_images)

    peers = {"eager": both(straightforward)}
    if compiled_too(case, precision):
        peers["torch.compile"] = both(compiled(straightforward))
    contest("freenet fwd+bwd", case.name, {"speedk": both(freenet)}, peers, flops=3 * products(case), memory=True,
            precision=precision)


@FAST_FIRST
@pytest.mark.parametrize("case", [MIDDLE, LARGE], ids=lambda c: c.name)
def bench_freenet_block(contest, case, precision):
    block = case.weights(precision).blocks[0]
    features, state, d_out = (torch.randn(case.N, case.J, case.D, device=DEVICE, dtype=dtype_of(precision))
                              for _ in range(3))  # fmt: skip
    leaves = [t.requires_grad_() for t in (features, state, *block)]

    def both(function):
        return lambda: torch.autograd.grad(function(features, state, block), leaves, d_out)

    contest("freenet_block fwd+bwd", case.name, {"speedk": both(freenet_block)}, {"eager": both(straightforward_block)},
            flops=18 * case.N * case.J * case.D**2, memory=True, precision=precision)
