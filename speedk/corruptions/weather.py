"""Weathers. Each takes float32 images [B, C, H, H] from 0 to 1; lengths are in pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from speedk.corruptions import filters

_GREY = (0.299, 0.587, 0.114)
_ICE = (0.88, 0.95, 1.0)
"""Of frost: the part of each channel."""
_NEEDLES = 3


def snow(images: Tensor, random: np.random.Generator, mean: float, deviation: float, size: float, threshold: float,
         radius: float, sigma: float, keep: float) -> Tensor:
    """Flakes: normal noise of `mean` and `deviation`, enlarged by `size`, what is under `threshold` removed, drawn into
    falling trails, and laid over the image once as it is and once turned by half; the image itself is whitened, by its
    grey, with the weight 1 - keep."""
    count, side = len(images), images.shape[-1]
    layer = mean + deviation * random.standard_normal((count, 1, side, side), np.float32)
    matrix = filters.zoom_matrix(side, max(1.0, size))
    layer = matrix @ torch.from_numpy(layer) @ matrix.T
    layer = filters.cut_off(torch.where(layer < threshold, 0.0, layer))
    layer = filters.rounded(filters.trail(layer, radius, sigma, random.uniform(-135, -45, count)))
    white = torch.maximum(images, _grey(images) * 1.5 + 0.5)
    return keep * images + (1 - keep) * white + layer + layer.rot90(2, (2, 3))


def frost(images: Tensor, random: np.random.Generator, keep: float, amount: float) -> Tensor:
    """keep times the image plus `amount` times a layer of ice crystals (procedural; the original's are photographs)."""
    layer = ice(len(images), images.shape[-1], random)
    tint = torch.tensor(_ICE) if images.shape[1] == 3 else torch.tensor([sum(_ICE) / 3])
    return keep * images + amount * layer * tint[:, None, None]


def ice(count: int, side: int, random: np.random.Generator) -> Tensor:
    """float32 [count, 1, side, side] from 0 to 1: needles in a few directions on ridges of plasma, thick in some places
    and thin in others."""
    ridges = 1 - (2 * filters.plasma(count, side, 1.5, random) - 1).abs()
    thickness = filters.plasma(count, side, 2.0, random)
    needles = torch.zeros(count, 1, side, side)
    reach = side / 8
    for _ in range(_NEEDLES):
        seeds = random.random((count, 1, side, side), np.float32)
        seeds = torch.from_numpy(seeds > 1 - 0.75 / reach).float()
        degrees = random.uniform(0, 360, count)
        needles = torch.maximum(needles, filters.trail(seeds, reach, reach, degrees))
    needles /= needles.amax((2, 3), keepdim=True).clamp(min=1e-6)
    return ((0.25 + 0.75 * thickness[:, None]) * (0.45 * ridges[:, None] ** 2 + 0.9 * needles)).clamp_(0, 1)


def fog(images: Tensor, random: np.random.Generator, amount: float, decay: float) -> Tensor:
    """`amount` of plasma, the finer the fainter by `decay`, added; then the image's brightest value as before."""
    brightest = images.amax((1, 2, 3), keepdim=True)
    layer = filters.plasma(len(images), images.shape[-1], decay, random)
    return (images + amount * layer[:, None]) * brightest / (brightest + amount)


def brightness(images: Tensor, random: np.random.Generator, amount: float) -> Tensor:
    """The value, the largest of a pixel's channels, raised by `amount` up to 1; hue and saturation as before."""
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-6)), raised)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    return (images * torch.tensor(_GREY)[:, None, None]).sum(1, keepdim=True)


CORRUPTIONS = (snow, frost, fog, brightness)
