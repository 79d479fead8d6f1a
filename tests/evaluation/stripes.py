"""A small data set in memory: three classes of 8 x 8 images that a network tells apart."""

from __future__ import annotations

import torch

from speedk.data.normaliser import ChannelNormaliser
from speedk.data.real import RealData, Subset, fingerprint
from speedk.geometry import Geometry

NAMES = ("left", "middle", "right")


def subset(count: int, seed: int) -> Subset:
    """A bright column block, at a place that depends on the class, on noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * count) % 3
    images = torch.randint(0, 120, (len(labels), 3, 8, 8), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, :, 3 * label:3 * label + 2] += 120
    return Subset(images, labels)


def make_real(seed: int = 0, normaliser: ChannelNormaliser | None = None) -> RealData:
    train, test = subset(20, seed), subset(30, seed + 100)
    return RealData("stripes", Geometry(3, 3, 8), NAMES, "made up", "", fingerprint(NAMES, train, test),
                    normaliser or ChannelNormaliser([0.3, 0.3, 0.3], [0.2, 0.25, 0.3]), train, test)
