"""What several corruptions are made of: Gaussian filters, trails, zooms, plasma. Images are float32 [B, C, H, H]."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_FAINT = 1e-5
"""A step of a trail whose weight is under this part of the first is left out."""
_ROUNDING = 1e-3
"""Of a step of 256: what float32 may have lost of a value that is a whole number of them."""


def gaussian_matrix(side: int, sigma: float, truncate: float = 4.0, mirrored: bool = False) -> Tensor:
    """float32 [side, side]: G so that G x G^T is x filtered by a Gaussian of `sigma` pixels, cut off at `truncate`
    sigmas; what lies outside is the nearest pixel, or mirrored at the edge (d c b a | a b c d | d c b a)."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return torch.eye(side)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weight = torch.exp(-offset.square() / (2 * sigma**2))
    weight /= weight.sum()
    source = torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)
    if mirrored:
        source = source.remainder(2 * side)
        source = torch.minimum(source, 2 * side - 1 - source)
    else:
        source = source.clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix.scatter_add_(1, source, weight.expand(side, -1).contiguous())
    return matrix.float()


def gaussian(images: Tensor, sigma: float, truncate: float = 4.0, mirrored: bool = False) -> Tensor:
    """`images` filtered by a Gaussian of `sigma` pixels, as `gaussian_matrix` says."""
    matrix = gaussian_matrix(images.shape[-1], sigma, truncate, mirrored)
    return matrix @ images @ matrix.T


def cut_off(images: Tensor) -> Tensor:
    """`images` from 0 to 1 in 256 steps, what is between two of them cut off, as NumPy's uint8 does."""
    return images.clamp(0, 1).mul_(255).add_(_ROUNDING).floor_().div_(255)


def rounded(images: Tensor) -> Tensor:
    """`images` from 0 to 1 in 256 steps, as ImageMagick writes them."""
    return images.clamp(0, 1).mul_(255).round_().div_(255)


def disk(radius: float, sigma: float) -> Tensor:
    """float32 [K, K], K odd: the pixels whose centres are within `radius` of the middle one, in equal parts, their edge
    softened by a Gaussian of `sigma` pixels over 3 x 3 pixels up to a radius of 8, and over 5 x 5 beyond.

    The published kernel ends 8 pixels from its middle, at a larger radius there, and is mirrored where the softening
    looks further: from a radius of 8 on its sum is above 1, by 1.3 % at 8, and the images become so much brighter.
    """
    half = 1 if radius <= 8 else 2
    reach = 8 if radius <= 8 else int(radius)
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (place[:, None] ** 2 + place**2 <= radius**2).double()
    edge = torch.exp(-torch.arange(-half, half + 1, dtype=torch.float64).square() / (2 * sigma**2))
    edge /= edge.sum()
    grown = F.pad(inside[None, None] / inside.sum(), (half,) * 4, mode="reflect")
    soft = F.conv2d(grown, torch.outer(edge, edge)[None, None])[0, 0].float()
    empty = min(int((soft.sum(0) > 0).nonzero()[0]), reach)
    return soft[empty:len(soft) - empty, empty:len(soft) - empty]


def scaled(kernel: Tensor, scale: float) -> Tensor:
    """The `kernel` [K, K] for images of `scale` times the size: each weight goes to the pixels it falls between."""
    reach = len(kernel) // 2
    half = math.ceil(reach * scale)
    place = torch.arange(-reach, reach + 1) * scale + half
    shares = (1 - (place[:, None] - torch.arange(2 * half + 1)).abs()).clamp(min=0)
    return shares.T @ kernel @ shares


def convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel filtered by `kernel` [K, K], mirrored at the centres of the outermost pixels."""
    pad = len(kernel) // 2
    planes = F.pad(images, (pad,) * 4, mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(planes, kernel[None, None]).reshape(images.shape)


def trail(images: Tensor, radius: float, sigma: float, degrees: np.ndarray) -> Tensor:
    """Each image averaged along its own direction `degrees` [B]: over the pixels at distances i = 0 to 2 radius, with
    the weights of half a Gaussian, exp(-i^2 / 2 sigma^2); what lies outside is the nearest edge pixel."""
    weight = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(round(2 * radius) + 1)]
    weight = [w for w in weight if w > _FAINT]
    angle = np.deg2rad(degrees)
    pad = len(weight) - 1
    side = images.shape[-1]
    windows = F.pad(images, (pad,) * 4, mode="replicate").unfold(2, side, 1).unfold(3, side, 1)
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # [B, 2 pad + 1, 2 pad + 1, C, H, H], a view
    rows = torch.arange(len(images))
    total = torch.zeros_like(images)
    for i, w in enumerate(weight):
        down, right = (torch.from_numpy(np.rint(i * part).astype(np.int64)) for part in (np.sin(angle), np.cos(angle)))
        total.add_(windows[rows, pad + down, pad + right], alpha=w / sum(weight))
    return total


def zoom_matrix(side: int, factor: float) -> Tensor:
    """float32 [side, side]: Z so that Z x Z^T is x enlarged by `factor`, 1 or more, bilinearly.

    As published: the middle ceil(side / factor) pixels, their centres spread evenly over the rounded size, of which the
    middle `side` pixels stay. The crop is of whole pixels, so that a small factor magnifies less than it says and
    shifts by up to a pixel.
    """
    crop = math.ceil(side / factor)
    size = round(crop * factor)
    first = (side - crop) // 2
    place = (torch.arange(side, dtype=torch.float64) + (size - side) // 2) * ((crop - 1) / max(1, size - 1)) + first
    low = place.floor().long().clamp(max=max(side - 2, 0))
    part = place - low
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], 1 - part[:, None])
    matrix.scatter_add_(1, (low + 1).clamp(max=side - 1)[:, None], part[:, None])
    return matrix.float()


def plasma(count: int, side: int, decay: float, random: np.random.Generator) -> Tensor:
    """float32 [count, side, side], each from 0 to 1 over its whole map: a fractal height map by midpoint displacement
    (diamond and square) on a torus, whose displacements fall by decay^2 from each scale to the next."""
    size = 1 << max(1, side - 1).bit_length()
    maps = np.zeros((count, size, size), np.float32)
    step, reach = size, 1.0

    def displaced(total: np.ndarray) -> np.ndarray:
        return total / 4 + reach * random.uniform(-1, 1, total.shape).astype(np.float32)

    while step > 1:
        half = step // 2
        corners = maps[:, ::step, ::step]
        across, along = corners + np.roll(corners, -1, 2), corners + np.roll(corners, -1, 1)
        centres = maps[:, half::step, half::step] = displaced(across + np.roll(across, -1, 1))
        maps[:, ::step, half::step] = displaced(across + centres + np.roll(centres, 1, 1))
        maps[:, half::step, ::step] = displaced(along + centres + np.roll(centres, 1, 2))
        step, reach = half, reach / decay**2
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return torch.from_numpy((maps - low) / (high - low))[:, :side, :side]
