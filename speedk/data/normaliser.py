"""From pixels to the space that networks see, and back to pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speedk.errors import DataError
from speedk.geometry import MAX_RESOLUTION


class Normaliser:
    """`normalise` maps uint8 or [0, 1] images to what is matched and trained on; `unit` maps back, for pictures."""

    kind: str

    def normalise(self, images: Tensor) -> Tensor:
        """float32 [M, C, H, W] of `images` [M, C, H, W]: uint8, or floating point in [0, 1]."""
        raise NotImplementedError

    def unit(self, images: Tensor) -> Tensor:
        """float32 [M, C, H, W] in [0, 1] (clamped) of normalised `images`."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """JSON from which `from_description` makes this normaliser again."""
        raise NotImplementedError


class ChannelNormaliser(Normaliser):
    """(x - mean) / std per channel."""

    kind = "channel"

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def normalise(self, images: Tensor) -> Tensor:
        mean, std = (column(values, images.device) for values in (self.mean, self.std))
        if images.dtype == torch.uint8:
            return images.float().sub_(mean * 255).div_(std * 255)
        return (images.float() - mean) / std

    def unit(self, images: Tensor) -> Tensor:
        return (images.float() * column(self.std, images.device) + column(self.mean, images.device)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": list(self.mean), "std": list(self.std)}


def column(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [C, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)[:, None, None]


def channel_statistics(images: Tensor) -> ChannelNormaliser:
    """The means and standard deviations of `images` (uint8 [M, C, H, W]) over all pixels, scaled to [0, 1].

    The sums are whole numbers, so that equal data give equal statistics on any machine. Raises DataError where all
    pixels of a channel are equal.
    """
    count = images.numel() // images.shape[1]
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for part in images.split(256):
        values = part.transpose(0, 1).flatten(1).to(torch.int32)
        total += values.sum(1).cpu()
        squares += (values * values).sum(1).cpu()
    mean, std = [], []
    for s, q in zip(total.tolist(), squares.tolist(), strict=True):
        variance = (count * q - s * s) / (count * 255) ** 2
        if variance == 0:
            raise DataError("all training pixels of a channel are equal: these images cannot be normalised")
        mean.append(s / (count * 255))
        std.append(math.sqrt(variance))
    return ChannelNormaliser(mean, std)


def from_description(description: Mapping[str, Any]) -> Normaliser:
    """The normaliser that `Normaliser.describe` described; a ZCA matrix is taken from the cache and its hash checked.

    Raises DataError, in one line, for a description that is not one, and where the ZCA matrix is not at hand.
    """
    if not isinstance(description, Mapping):
        raise DataError("the normaliser's description is not a table")
    if description.get("kind") == "channel":
        _fields(description, {"kind", "mean", "std"})
        mean, std = description["mean"], description["std"]
        for values in (mean, std):
            if not isinstance(values, (list, tuple)) or len(values) not in (1, 3) or not all(map(finite, values)):
                raise DataError("the normaliser's mean and std must each be 1 or 3 finite numbers")
        if len(mean) != len(std) or min(std) <= 0:
            raise DataError("the normaliser needs one positive std for each mean")
        return ChannelNormaliser([float(v) for v in mean], [float(v) for v in std])
    if description.get("kind") == "zca":
        from speedk.data.zca import from_cache  # zca builds on this module

        _fields(description, {"kind", "eps", "shape", "data", "matrix"})
        eps, shape = description["eps"], description["shape"]
        if not finite(eps) or not 0 < eps < 1e6:
            raise DataError("the ZCA description's eps is not a positive number")
        if (not isinstance(shape, (list, tuple)) or len(shape) != 3
                or not all(type(side) is int and 0 < side <= MAX_RESOLUTION for side in shape)):
            raise DataError("the ZCA description's shape is not three sides")
        for name in ("data", "matrix"):
            if not isinstance(description[name], str) or not re.fullmatch("[0-9a-f]{64}", description[name]):
                raise DataError(f"the ZCA description's {name} is not a hash of 64 hexadecimal digits")
        return from_cache(float(eps), tuple(shape), description["data"], description["matrix"])
    raise DataError("the normaliser's kind is neither 'channel' nor 'zca'")


def finite(value: Any) -> bool:
    """A finite real number that fits a float32, and not a bool."""
    return type(value) in (int, float) and abs(value) < 1e30


def _fields(description: Mapping[str, Any], wanted: set[str]) -> None:
    if set(description) != wanted:
        raise DataError(f"the normaliser's description must have {', '.join(sorted(wanted))}, and nothing else")
