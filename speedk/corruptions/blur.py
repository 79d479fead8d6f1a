"""Blurs. Each takes float32 images [B, C, H, H] from 0 to 1; lengths are in pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from speedk.corruptions import filters


def defocus_blur(images: Tensor, random: np.random.Generator, radius: float, sigma: float,
                 scale: float = 1.0) -> Tensor:
    """The mean over a disk of `radius`, its edge softened by `sigma`, the whole scaled by `scale`."""
    return filters.convolve(images, filters.scaled(filters.disk(radius, sigma), scale))


def glass_blur(images: Tensor, random: np.random.Generator, sigma: float, reach: float, rounds: int) -> Tensor:
    """A Gaussian of `sigma`, then `rounds` times each pixel, from the last to the first, takes the value of one up to
    `reach` pixels before it (and less than that behind it) in either direction; then the Gaussian again.

    The two were meant to change places. The published files were made by an exchange of NumPy views, which leaves the
    other pixel as it was, and so does this."""
    count, side, reach = len(images), images.shape[-1], math.ceil(reach)
    place = np.tile(np.arange(side * side)[:, None], count)  # of each pixel, where it comes from: [H H, B]
    image = np.arange(count)
    for _ in range(rounds):
        for row in range(side - reach, reach, -1):
            down, right = random.integers(-reach, reach, (2, side, count))
            for column in range(side - reach, reach, -1):
                here = row * side + column
                place[here] = place[here + down[column - 1] * side + right[column - 1], image]
    soft = filters.cut_off(filters.gaussian(images, sigma))
    source = torch.from_numpy(np.ascontiguousarray(place.T))[:, None].expand(-1, images.shape[1], -1)
    return filters.gaussian(soft.flatten(2).gather(2, source).reshape(images.shape), sigma)


def motion_blur(images: Tensor, random: np.random.Generator, radius: float, sigma: float) -> Tensor:
    """A trail in a direction of its own for each image, within 45 degrees of the horizontal."""
    return filters.rounded(filters.trail(images, radius, sigma, random.uniform(-45, 45, len(images))))


def zoom_blur(images: Tensor, random: np.random.Generator, largest: float, step: float) -> Tensor:
    """The mean of the image and of it enlarged by the factors of `numpy.arange(1, largest, step)`."""
    factors = np.arange(1, largest, step)  # its rounding, which lets some end at `largest`, is the published files'
    total = images.clone()
    for factor in factors:
        matrix = filters.zoom_matrix(images.shape[-1], float(factor))
        total += matrix @ images @ matrix.T
    return total / (len(factors) + 1)


CORRUPTIONS = (defocus_blur, glass_blur, motion_blur, zoom_blur)
