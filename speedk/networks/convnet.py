"""The ConvNet of the distillation literature."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.networks._convolution import Convolution
from speedk.networks._instance_norm import InstanceNorm
from speedk.ops import norm_act_pool


class ConvNet(nn.Module):
    """`depth` times [3x3 convolution, InstanceNorm (affine), ReLU, 2x2 average pooling], then one linear layer.

    The default depth pools the image down to 3 or 4 pixels a side: 3 at 28 and 32 pixels, 4 at 64, 5 at 128, 6 at 256.
    """

    per_sample = True

    def __init__(self, geometry: Geometry, depth: int | None = None, width: int = 128) -> None:
        super().__init__()
        if depth is None:
            depth = max(1, round(math.log2(geometry.resolution)) - 2)
        side = geometry.resolution >> depth
        if depth < 1 or side < 1:
            raise ConfigError(f"a ConvNet of depth {depth} needs a depth of at least 1 and images of at least "
                              f"{2 ** max(depth, 1)} pixels a side, not {geometry.resolution}")
        channels = [geometry.channels] + [width] * depth
        self.convolutions = nn.ModuleList(
            Convolution(c_in, c_out, kernel_size=3, padding=1) for c_in, c_out in itertools.pairwise(channels))
        self.norms = nn.ModuleList(InstanceNorm(width) for _ in range(depth))
        self.classifier = nn.Linear(width * side**2, geometry.classes)

    def features(self, images: Tensor) -> Tensor:
        """The embedding [B, width * side^2] of images [B, C, H, W]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms):
            # The norm takes a channel's mean away, and the bias with it.
            x = norm_act_pool(convolution(x, add_bias=False), norm.weight, norm.bias)
        return x.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.classifier(self.features(images))


PLUGIN = ConvNet
