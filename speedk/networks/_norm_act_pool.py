"""InstanceNorm, ReLU and average pooling: what stands between two convolutions of the ConvNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Per image and channel, (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance.

    x: [B, C, H, W]; weight, bias: [C]. Written as a group norm with one channel a group: the same function, and on
    the CPU 1.1 to 1.3 times faster forward and backward than `F.instance_norm`, which repeats weight and bias B times.
    """
    return F.group_norm(x, x.shape[1], weight, bias, eps)


def norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`instance_norm`, ReLU and 2x2 average pooling: [B, C, H, W] -> [B, C, H // 2, W // 2]."""
    return F.avg_pool2d(F.relu(instance_norm(x, weight, bias, eps), inplace=True), 2)
