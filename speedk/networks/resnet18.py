"""ResNet18 for small images, with InstanceNorm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.networks._convolution import Convolution
from speedk.networks._instance_norm import InstanceNorm

SMALLEST = 9
"""Below this the last stage is one pixel a channel, which InstanceNorm turns into nothing."""


class ResNet18(nn.Module):
    """A 3x3 convolution (no pooling), four stages of two basic blocks of `width` x 1, 2, 4 and 8 channels, the last
    three at half the resolution of the one before, the mean over all pixels, and one linear layer. Every convolution
    is followed by an affine InstanceNorm."""

    per_sample = True

    def __init__(self, geometry: Geometry, width: int = 64) -> None:
        super().__init__()
        if geometry.resolution < SMALLEST:
            raise ConfigError(f"resnet18 needs images of at least {SMALLEST} pixels a side, not {geometry.resolution}")
        self.stem = _convolution(geometry.channels, width, 1)
        self.stem_norm = InstanceNorm(width)
        blocks, c_in = [], width
        for stage in range(4):
            c_out = width * 2**stage
            blocks += [BasicBlock(c_in, c_out, 1 if stage == 0 else 2), BasicBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(c_in, geometry.classes)

    def features(self, images: Tensor) -> Tensor:
        """The embedding [B, 8 * width] of images [B, C, H, W]."""
        return self.blocks(F.relu(self.stem_norm(self.stem(images)))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.classifier(self.features(images))


class BasicBlock(nn.Module):
    """ReLU(x + norm(conv(ReLU(norm(conv(x)))))), x through a 1x1 convolution and a norm where its shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(c_in, c_out, stride), InstanceNorm(c_out)
        self.second, self.second_norm = _convolution(c_out, c_out, 1), InstanceNorm(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(Convolution(c_in, c_out, 1, stride, bias=False), InstanceNorm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / stride, W / stride], rounded up."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.shortcut(x) + self.second_norm(self.second(y)))


def _convolution(c_in: int, c_out: int, stride: int) -> Convolution:
    return Convolution(c_in, c_out, 3, stride, padding=1, bias=False)


PLUGIN = ResNet18
