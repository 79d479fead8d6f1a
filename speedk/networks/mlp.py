"""The multilayer perceptron of the distillation literature."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from speedk.geometry import Geometry


class MLP(nn.Module):
    """Three linear layers with ReLU between them; both hidden layers have `width` units."""

    def __init__(self, geometry: Geometry, width: int = 128) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(geometry.pixels, width), nn.Linear(width, width)])
        self.classifier = nn.Linear(width, geometry.classes)

    def features(self, images: Tensor) -> Tensor:
        """The embedding [B, width] of images [B, C, H, W]."""
        x = images.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.classifier(self.features(images))


PLUGIN = MLP
