"""The 15 standard corruptions of Hendrycks and Dietterich (2019) at five severities, made on the fly.

Written from what their files were made by, in parameters, order, edges and rounding: the CIFAR-C set for images below
64 pixels, Tiny-ImageNet-C's from 64 and ImageNet-C's from 128, with every length in pixels scaled from their 32, 64 or
224 pixels to the images' own side. What differs: the random draws; `frost`, which lays procedural ice crystals over
the image instead of crops of photographs; `elastic_transform`, whose affine map OpenCV rounds to 1/32 of a pixel; and
that Tiny-ImageNet-C's and ImageNet-C's images were stored as JPEG files of quality 85.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from speedk.corruptions import blur, digital, filters, noise, weather
from speedk.corruptions.levels import SEVERITIES, levels
from speedk.errors import ConfigError
from speedk.registry import nearest

__all__ = ["GROUPS", "NAMES", "SEVERITIES", "corrupt", "levels"]

GROUPS = {"noise": noise, "blur": blur, "weather": weather, "digital": digital}
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for module in GROUPS.values() for function in module.CORRUPTIONS}
NAMES: tuple[str, ...] = tuple(_FUNCTIONS)
"""In the standard order: three noises, four blurs, four weathers, four digital ones."""

_BLOCK = 1 << 24
"""Pixels (count x height x width) that are made at a time. Part of the definition: each block has a stream of random
numbers of its own."""


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """The images uint8 [N, C, H, H], C 1 or 3, with the corruption `name` of `severity` 1 to 5: uint8, on the CPU.

    Equal images, name, severity and seed give equal results. Raises ConfigError for another name or severity,
    ValueError for images of another kind.
    """
    if name not in NAMES:
        raise ConfigError(f"corruption {name!r} is not one of {', '.join(NAMES)}{nearest(name, list(NAMES))}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity} is not one of 1 to 5")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or (
            images.shape[2] != images.shape[3]):
        raise ValueError(f"images must be uint8 [N, 1 or 3, H, H], not {images.dtype} {list(images.shape)}")
    side = images.shape[-1]
    parameters = levels(name, side)[severity - 1]
    result = torch.empty(images.shape, dtype=torch.uint8)
    size = max(1, _BLOCK // side**2)
    for i, (block, target) in enumerate(zip(images.cpu().split(size), result.split(size))):
        random = np.random.default_rng([seed, NAMES.index(name), severity, i])
        made = _FUNCTIONS[name](block.float() / 255, random, *parameters)
        target.copy_(filters.cut_off(made).mul_(255).round_())
    return result
