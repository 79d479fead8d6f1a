"""A small real set with something to learn, for tests of whole runs, and augmentations that are known."""

from __future__ import annotations

import torch

from speedk.augment import dsa
from speedk.data import RealData, Subset
from speedk.data.normaliser import ChannelNormaliser
from speedk.data.real import fingerprint
from speedk.geometry import Geometry

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make_real(classes: int = 3, channels: int = 3, resolution: int = 16, count: int = 12, seed: int = 0) -> RealData:
    """Noisy stripes: the class sets their frequency."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"stripes {i}" for i in range(classes))

    def part(count: int) -> Subset:
        labels = torch.arange(classes).repeat_interleave(count)
        wave = torch.sin(torch.arange(resolution)[None] * (labels[:, None] + 1) * 6.28 / resolution)
        images = 128 + 80 * wave[:, None, :, None].expand(-1, channels, -1, resolution)
        images = images + 20 * torch.randn(len(labels), channels, resolution, resolution, generator=generator)
        return Subset(images.clamp(0, 255).to(torch.uint8), labels)

    train, test = part(count), part(4)
    normaliser = ChannelNormaliser((0.5,) * channels, (0.25,) * channels)
    return RealData("stripes", Geometry(classes, channels, resolution), names, "made", "",
                    fingerprint(names, train, test), normaliser, train, test)


GIVEN = (("scale", {"x": 1.1, "y": 0.9}), ("crop", {"down": 1, "right": -1}), ("color", {
    "brightness": 0.3, "saturation": 1.5, "contrast": 0.7}), ("rotate", {"degrees": 9.0}), ("flip", {"flip": True}))
"""Draws that change every image, and no two alike: what is not given the right one is seen."""


def given_draws(monkeypatch, resolution: int) -> list[dsa.Draw]:
    """From here on the draws of augmentation are those of GIVEN in turn; the list fills with them."""
    drawn: list[dsa.Draw] = []

    def draw(*_, **__) -> dsa.Draw:
        op, values = GIVEN[len(drawn) % len(GIVEN)]
        drawn.append(dsa.Draw(op, resolution, {key: torch.tensor([value]) for key, value in values.items()}))
        return drawn[-1]

    monkeypatch.setattr(dsa, "draw", draw)
    return drawn
