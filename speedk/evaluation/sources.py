"""What can be evaluated: a distilled file, images and labels of other code, real images, the whole data set."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from speedk import seeds
from speedk.errors import ConfigError, DataError
from speedk.geometry import Geometry
from speedk.training import ImageSet

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.artifact import Distilled


@dataclass(frozen=True)
class Source:
    """Training images, and what a report says of them.

    title: what they are; images(seed, real, device): the set that the run of that seed trains on; size: its images;
    rate: to train at, or None for the protocol's; standardisation: the one they were made for, or None; storage: parts
    and their float32-equivalents; whole: whether this is the whole data set; details: more for the report (JSON types).
    """

    title: str
    images: Callable[[int, RealData, torch.device], ImageSet]
    size: int
    rate: float | None = None
    standardisation: str | None = None
    storage: dict[str, float] = field(default_factory=dict)
    whole: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def fixed(images: Tensor, labels: Tensor) -> Callable[[int, RealData, torch.device], ImageSet]:
    """`Source.images` of the same normalised images for every run: one copy on a device, however many train there."""
    on = functools.cache(lambda device: ImageSet.of(images, labels, device))
    return lambda seed, real, device: on(device)


def whole(real: RealData) -> Source:
    """All training images: the upper bound."""
    def images(seed: int, real: RealData, device: torch.device) -> ImageSet:
        return ImageSet(lambda index: real.normalised("train", index), real.train.labels)

    size = len(real.train)
    return Source("the whole data set", images, size, storage=_plain(size, real.geometry), whole=True)


def real_images(real: RealData, ipc: int = 1) -> Source:
    """`ipc` real training images per class, drawn anew for each run by its seed."""
    def images(seed: int, real: RealData, device: torch.device) -> ImageSet:
        drawn = [real.sample(label, ipc, seeds.generator(seed, "real images", label))
                 for label in range(real.geometry.classes)]
        labels = torch.repeat_interleave(torch.arange(len(drawn)), torch.tensor([len(part) for part in drawn]))
        return ImageSet.of(torch.cat(drawn), labels, device)

    smallest = int(torch.bincount(real.train.labels.cpu(), minlength=real.geometry.classes).min())
    if not 1 <= ipc <= smallest:
        raise ConfigError(f"{ipc} real images per class cannot be drawn: the smallest class has {smallest}")
    title = "one real image per class" if ipc == 1 else f"{ipc} real images per class"
    size = ipc * real.geometry.classes
    return Source(f"{title}, drawn anew for each run", images, size, storage=_plain(size, real.geometry))


def distilled(artifact: Distilled, real: RealData, other_data: bool = False) -> tuple[Source, RealData]:
    """The source that a distilled file is, and `real` as it has to be tested on: of the classes that the file was
    distilled from, and normalised as its images are.

    Raises DataError where the file was distilled from other data, another split or another normalisation than `real`,
    unless `other_data` says that this is meant; a geometry that differs is always an error.
    """
    header = artifact.header
    if header["data"].get("classes") and len(header["class_names"]) < len(real.class_names):
        real = real.only(header["class_names"])  # it was distilled from these alone
    if artifact.geometry != real.geometry:
        raise DataError(f"{artifact.path} holds {_shape(artifact.geometry)}, but {real.name} has "
                        f"{_shape(real.geometry)}: evaluate it on the data it was distilled from")
    said = header["data"]
    described = real.normaliser.describe()
    if header["normaliser"] != described:
        if not other_data:
            if said.get("fingerprint") == real.fingerprint:
                raise DataError(f"{artifact.path} was distilled with the normaliser {_brief(header['normaliser'])}, "
                                f"but the data were loaded with {_brief(described)}: load them as they were")
            raise _elsewhere(artifact.path, said, real)
        from speedk import data

        real = replace(real, normaliser=data.from_description(header["normaliser"]))
    if said.get("fingerprint") != real.fingerprint and not other_data:
        raise _elsewhere(artifact.path, said, real)
    images, labels = artifact.images("normalised"), artifact.labels
    return Source(
        artifact.path, fixed(images, labels), len(labels),
        rate=header["objective"].get("lr"), standardisation=header["protocol"],
        storage={part: numbers for part, numbers, _ in artifact.storage()},
        details={"method": artifact.method, "objective": header["objective"]["name"], "ipc": artifact.ipc,
                 "checksum": artifact.fingerprint, "numbers": header["numbers"], "budget": header["budget"],
                 "distilled_from": said}), real


def arrays(path: str | Path, images: Tensor, labels: Tensor, real: RealData, normalised: bool = False) -> Source:
    """Images and labels of other code: uint8 or floating point in [0, 1], or `normalised` as `real` is.

    images: [N, C, H, W] or [N, H, W, C]; labels: whole numbers [N] or floating point [N, classes]. Raises DataError
    where they are not that, or do not fit `real`.
    """
    g = real.geometry
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1:] != (g.channels, g.resolution, g.resolution):
        images = images.permute(0, 3, 1, 2)
    if len(shape) != 4 or tuple(images.shape[1:]) != (g.channels, g.resolution, g.resolution) or not shape[0]:
        raise DataError(f"{path} holds images of shape {list(shape)}, but {real.name} has {_shape(g)}")
    if images.is_floating_point():
        images = images.float().contiguous()
        low, high = (float(v) for v in torch.aminmax(images))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(f"{path} holds images with values that are not finite")
        if not normalised and (low < 0 or high > 1):
            raise DataError(f"{path} holds images with values from {low:g} to {high:g}: uint8, or numbers from 0 to 1, "
                            "are read (normalised images need an entry space = 'normalised')")
    elif images.dtype != torch.uint8 or normalised:
        wanted = "normalised images are floating point" if normalised else "uint8, or numbers from 0 to 1, are read"
        raise DataError(f"{path} holds images of {str(images.dtype).removeprefix('torch.')}: {wanted}")
    labels = _labels(path, labels, len(images), g.classes)
    ready = images if normalised else real.normaliser.normalise(images.contiguous())
    return Source(str(path), fixed(ready, labels), len(labels), storage=_plain(len(labels), g))


def _labels(path: str | Path, labels: Tensor, count: int, classes: int) -> Tensor:
    if labels.is_floating_point():
        if tuple(labels.shape) != (count, classes) or not bool(labels.isfinite().all()) or bool((labels < 0).any()):
            raise DataError(f"{path} holds labels that are not {count} rows of {classes} probabilities")
        return labels.float()
    if labels.dtype == torch.bool or tuple(labels.shape) != (count,):
        raise DataError(f"{path} holds labels of shape {list(labels.shape)} for {count} images: one whole number each")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{path} holds labels from {low} to {high}, but the classes are 0 to {classes - 1}")
    return labels


def _elsewhere(path: str, said: dict[str, Any], real: RealData) -> DataError:
    there, here = (f"{d.get('name')} (split {d.get('split')}, {str(d.get('fingerprint'))[:8]})"
                   for d in (said, real.describe()))
    return DataError(f"{path} was distilled from {there}, but is to be evaluated on {here}: give the same data, or "
                     "say that this is meant with --other-data")


def _shape(g: Geometry) -> str:
    return f"{g.classes} classes of {g.shape}"


def _brief(description: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value)[:40]}" for key, value in description.items())


def _plain(count: int, geometry: Geometry) -> dict[str, float]:
    return {"images": count * geometry.pixels}
