"""Noises. Each takes float32 images [B, C, H, H] from 0 to 1; what it gives is cut to that range afterwards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def gaussian_noise(images: Tensor, random: np.random.Generator, deviation: float) -> Tensor:
    """Normal noise of `deviation` on every value."""
    return images + deviation * torch.from_numpy(random.standard_normal(images.shape, np.float32))


def shot_noise(images: Tensor, random: np.random.Generator, photons: float) -> Tensor:
    """Poisson noise, as where white is `photons` photons."""
    return torch.from_numpy((random.poisson(images.numpy() * photons) / photons).astype(np.float32))


def impulse_noise(images: Tensor, random: np.random.Generator, amount: float) -> Tensor:
    """Salt and pepper: the part `amount` of all values becomes 0 or 1, with equal chance."""
    chance = torch.from_numpy(random.random(images.shape, np.float32))
    return torch.where(chance < amount, (chance < amount / 2).to(images), images)


CORRUPTIONS = (gaussian_noise, shot_noise, impulse_noise)
