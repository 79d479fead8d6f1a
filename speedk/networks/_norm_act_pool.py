"""InstanceNorm, ReLU and average pooling: what stands between two convolutions of the ConvNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`instance_norm`, ReLU and 2x2 average pooling: [B, C, H, W] -> [B, C, H // 2, W // 2]."""
    return average_pool(F.relu(instance_norm(x, weight, bias, eps), inplace=True))


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Per image and channel, (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    x: [B, C, H, W]; weight, bias: [C]. Written as a group norm with one channel a group: the same function, and on
    the CPU 1.1 to 1.3 times faster forward and backward than `F.instance_norm`, which repeats weight and bias B times.
    """
    return F.group_norm(x, x.shape[1], weight, bias, eps)


def average_pool(x: Tensor) -> Tensor:
    """The mean of each 2x2 square: [B, C, H, W] -> [B, C, H // 2, W // 2]; an odd last row or column is left out.

    On the CPU `F.avg_pool2d` takes 3 to 5 times as long as four strided sums, forward and backward.
    """
    return F.avg_pool2d(x, 2) if x.is_cuda else _Pool.apply(x)


class InstanceNorm(nn.Module):
    """`instance_norm` with its learned weight (ones) and bias (zeros)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x, self.weight, self.bias)


class _Pool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        h, w = (side // 2 * 2 for side in x.shape[2:])
        rows = x[:, :, :h:2, :w] + x[:, :, 1:h:2, :w]
        return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.sides = inputs[0].shape[2:]

    @staticmethod
    def backward(ctx, d_pooled: Tensor) -> Tensor:
        return _Spread.apply(d_pooled, *ctx.sides)


class _Spread(torch.autograd.Function):
    """The adjoint of `_Pool`: a quarter of each value to each pixel of its square. Its own adjoint is `_Pool`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pooled: Tensor, height: int, width: int) -> Tensor:
        b, c, h, w = pooled.shape
        quarter = pooled * 0.25
        rows = pooled.new_empty(b, c, h, 2 * w)
        rows[..., ::2] = quarter
        rows[..., 1::2] = quarter
        spread = rows[:, :, :, None].expand(b, c, h, 2, 2 * w).reshape(b, c, 2 * h, 2 * w)
        return F.pad(spread, (0, width - 2 * w, 0, height - 2 * h)) if (height, width) != (2 * h, 2 * w) else spread

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, d_spread: Tensor):
        return _Pool.apply(d_spread), None, None
