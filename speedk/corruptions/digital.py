"""Digital corruptions. Each takes float32 images [B, C, H, H] from 0 to 1; lengths are in pixels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from speedk.corruptions import filters


def contrast(images: Tensor, random: np.random.Generator, amount: float) -> Tensor:
    """The distance from each channel's mean over the image times `amount`."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * amount + mean


def elastic_transform(images: Tensor, random: np.random.Generator, strength: float, sigma: float,
                      shift: float) -> Tensor:
    """The affine map that moves each of three points (at a third of the side from the centre) by up to `shift` in
    either direction, then each pixel moved by uniform noise of `strength`, filtered by a Gaussian of `sigma`."""
    count, side = len(images), images.shape[-1]
    centre, arm = side // 2, side // 3
    corners = np.array([(arm, arm), (arm, -arm), (-arm, -arm)], np.float64) + centre  # x, y
    moved = corners + random.uniform(-shift, shift, (count, 3, 2))
    # Pixel p of the result comes from M (p, 1), where M takes the moved points to where they were.
    matrix = np.linalg.solve(np.concatenate([moved, np.ones((count, 3, 1))], 2), np.tile(corners, (count, 1, 1)))
    pixel = np.stack([*np.meshgrid(np.arange(side), np.arange(side)), np.ones((side, side))], 2)  # x, y, 1
    affine = torch.from_numpy(np.einsum("hwi,bij->bhwj", pixel, matrix).astype(np.float32))
    images = _sample(images, affine, centres=True)
    if strength == 0:
        return images
    field = torch.from_numpy(random.uniform(-1, 1, (count, 2, side, side)).astype(np.float32))
    field = strength * filters.gaussian(field, sigma, truncate=3.0, mirrored=True)
    here = torch.from_numpy(pixel[..., :2].astype(np.float32))
    return _sample(images, here + field.permute(0, 2, 3, 1), centres=False)


def pixelate(images: Tensor, random: np.random.Generator, part: float) -> Tensor:
    """Shrunk to `part` of the side and enlarged again, both by Pillow's box filter."""
    side = images.shape[-1]
    small = max(1, int(side * part))

    def through(image: Image.Image) -> Image.Image:
        return image.resize((small, small), Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)

    return _by_pillow(images, through)


def jpeg_compression(images: Tensor, random: np.random.Generator, quality: int) -> Tensor:
    """Stored as a JPEG file of `quality`."""
    def through(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _by_pillow(images, through)


def _sample(images: Tensor, places: Tensor, centres: bool) -> Tensor:
    """Each image at its `places` [B, H, H, 2] (x, y, in pixels), bilinearly, mirrored at the centres of the outermost
    pixels, or at their outer edges."""
    side = images.shape[-1]
    grid = places * (2 / max(1, side - 1)) - 1 if centres else (2 * places + 1) / side - 1
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=centres)


def _by_pillow(images: Tensor, through: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each image as 8 bits a value through a function of Pillow images."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    made = [np.asarray(through(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p))) for p in pixels]
    return torch.from_numpy(np.stack(made)).reshape(pixels.shape).permute(0, 3, 1, 2).float() / 255


CORRUPTIONS = (contrast, elastic_transform, pixelate, jpeg_compression)
