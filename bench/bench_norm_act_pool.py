"""InstanceNorm, ReLU and pooling of the students' ConvNet in one, against PyTorch's three."""

import pytest
import torch
from cases import DEVICE
from torch.nn.functional import avg_pool2d, instance_norm, relu

from speedk.ops import norm_act_pool
from speedk.ops.norm_act_pool import norm_act_pool_reference


@pytest.mark.parametrize("side", [32, 16])
def bench_norm_act_pool(contest, side):
    x = torch.randn(64, 128, side, side, device=DEVICE)
    weight, bias = torch.randn(128, device=DEVICE), torch.randn(128, device=DEVICE)
    d_out = torch.randn(64, 128, side // 2, side // 2, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def three(x, weight, bias):
        return avg_pool2d(relu(instance_norm(x, weight=weight, bias=bias)), 2)

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)

    contest("norm_act_pool fwd+bwd", f"64x128x{side}x{side}", {"speedk": both(norm_act_pool)},
            {"instance_norm, relu, pool": both(three),
             "group_norm, relu, pool": both(lambda x, w, b: norm_act_pool_reference(x, w, b, 1e-5))},
            moved=4 * 3 * x.numel())
