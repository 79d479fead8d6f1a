"""InstanceNorm, ReLU and pooling of the students' ConvNet in one, against PyTorch's three: 32 pixels, and 128."""

import pytest
import torch
from measuring import DEVICE
from torch.nn.functional import avg_pool2d, instance_norm, relu

from speedk.ops import norm_act_pool
from speedk.ops.norm_act_pool import norm_act_pool_reference

FORMATS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


def three(x, weight, bias):
    return avg_pool2d(relu(instance_norm(x, weight=weight, bias=bias)), 2)


def grouped(x, weight, bias):
    return norm_act_pool_reference(x, weight, bias, 1e-5)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd", "fwd+2bwd"])
@pytest.mark.parametrize(("batch", "side"), [(64, 32), (64, 16), (64, 8), (8, 128)])
def bench_norm_act_pool(contest, batch, side, direction):
    shape = (batch, 128, side, side)
    plain = torch.randn(shape, device=DEVICE)
    weight, bias = torch.randn(128, device=DEVICE), torch.randn(128, device=DEVICE)
    pooled = torch.randn(batch, 128, side // 2, side // 2, device=DEVICE)
    slopes = [torch.randn_like(t) for t in (plain, weight, bias)]

    def run(function, layout):
        x, d_out, slope = (t.contiguous(memory_format=layout) for t in (plain, pooled, slopes[0]))
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        d_out = d_out.detach().requires_grad_()

        def call():
            if direction == "fwd":
                with torch.no_grad():
                    return function(*leaves)
            twice = direction != "fwd+bwd"
            first = torch.autograd.grad(function(*leaves), leaves, d_out, create_graph=twice)
            return torch.autograd.grad(first, (d_out, *leaves[:2]), [slope, *slopes[1:]]) if twice else first

        return call

    planes = {"fwd": 1.25, "fwd+bwd": 3.5, "fwd+2bwd": 7}[direction]
    contest(f"norm_act_pool {direction}", "x".join(map(str, shape)),
            {f"speedk{name}": run(norm_act_pool, layout) for name, layout in FORMATS.items()},
            {"instance_norm, relu, pool": run(three, torch.contiguous_format),
             "group_norm, relu, pool": run(grouped, torch.contiguous_format)},
            moved=int(4 * planes * plain.numel()), apart=0.01)
