"""The fused norm on its own, against PyTorch's addition and LayerNorm, and on a GPU against Liger Kernel's LayerNorm
where that package is installed (`pip install -e '.[bench]'`)."""

import importlib.util

import pytest
import torch
from cases import DEEP, MIDDLE
from measuring import DEVICE
from torch.nn.functional import layer_norm

from speedk.ops import add_layer_norm


@pytest.mark.parametrize("case", [MIDDLE, DEEP], ids=lambda c: c.name)
def bench_add_layer_norm(contest, case):
    x, residual, d_out = (torch.randn(case.N, case.J, case.D, device=DEVICE) for _ in range(3))
    weight, bias = torch.randn(case.D, device=DEVICE), torch.randn(case.D, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]

    def library(x, residual, weight, bias):
        return layer_norm(x + residual, x.shape[-1:], weight, bias, 1e-6)

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)

    peers = {"add, layer_norm": both(library)}
    if DEVICE != "cuda":
        peers["add, liger"] = "runs on a GPU alone"
    elif importlib.util.find_spec("liger_kernel") is None:
        peers["add, liger"] = "is not installed"
    else:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        peers["add, liger"] = both(lambda x, residual, *w: LigerLayerNormFunction.apply(x + residual, *w, 1e-6))
    contest("add_layer_norm fwd+bwd", case.name, {"speedk": both(add_layer_norm)}, peers, moved=4 * 6 * x.numel())
