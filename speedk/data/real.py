"""Real images in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from speedk.data.normaliser import Normaliser
from speedk.geometry import Geometry

Name = Literal["train", "test"]

KEEP_BYTES = 2**30
"""A ZCA-whitened float32 copy of a part is kept once made if it fits in this: whitening 2,560 CIFAR images takes a
third of a second on four cores, indexing them some milliseconds. CIFAR's training part takes 0.57 GiB."""

_WHITENING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Subset:
    """Images uint8 [M, C, H, W] and labels int64 [M]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Subset:
        return Subset(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class RealData:
    """A labelled image set with a training and a test part; `load` makes it."""

    name: str
    geometry: Geometry
    class_names: tuple[str, ...]
    split: str
    """Which split, in words for a report: "official", "fastai", "ilsvrc", "stratified 80/20, seed 0", "folder"."""
    note: str
    """What must be said wherever the data are named, or ""."""
    fingerprint: str
    """sha256 over class names, images and labels of both parts."""
    normaliser: Normaliser
    train: Subset
    test: Subset

    @cached_property
    def _members(self) -> tuple[Tensor, ...]:
        """Rows of the training images of each class, on the CPU."""
        labels = self.train.labels.cpu()
        counts = torch.bincount(labels, minlength=self.geometry.classes)
        return torch.argsort(labels, stable=True).split(counts.tolist())

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        """Whitened copies of parts, by name."""
        return {}

    def sample(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Normalised float32 [min(count, class size), C, H, W]: random training images of class `label`, none twice."""
        if not 0 <= label < self.geometry.classes:
            raise ValueError(f"label {label} is not in 0..{self.geometry.classes - 1}")
        members = self._members[label]
        order = torch.randperm(len(members), generator=generator, device=generator.device)
        return self.normalised("train", members[order[:count].cpu()])

    def normalised(self, part: Name = "train", index: Tensor | None = None) -> Tensor:
        """Normalised float32 [M, C, H, W] of a part, or of the rows `index` (int64) of it. Not to be written to."""
        images = self._subset(part).images
        if index is not None:
            index = index.to(images.device)
        if self.normaliser.kind == "zca" and images.numel() * 4 <= KEEP_BYTES:
            # Always through the kept copy where it fits: a row's last bits must not depend on who asked before. Threads
            # that train side by side ask at the same moment, and one copy is enough.
            with _WHITENING:
                if part not in self._kept:
                    self._kept[part] = self.normaliser.normalise(images)
            return self._kept[part] if index is None else self._kept[part][index]
        return self.normaliser.normalise(images if index is None else images[index])

    def to(self, device: torch.device | str) -> RealData:
        """The same data with its uint8 images and its labels on `device`; itself where they are there."""
        if torch.empty(0, device=device).device == self.train.images.device == self.test.images.device:
            return self
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def describe(self) -> dict[str, Any]:
        """JSON for reports and for the artifact's header."""
        return {"name": self.name, "split": self.split, "note": self.note, "fingerprint": self.fingerprint,
                "train": len(self.train), "test": len(self.test)}

    def _subset(self, part: Name) -> Subset:
        if part not in ("train", "test"):
            raise ValueError(f"part {part!r} is neither 'train' nor 'test'")
        return self.train if part == "train" else self.test


def fingerprint(class_names: tuple[str, ...], *parts: Subset) -> str:
    """sha256, hexadecimal, over the class names and each part's shape, images and labels."""
    digest = hashlib.sha256(json.dumps([list(class_names), *(list(part.images.shape) for part in parts)]).encode())
    for part in parts:
        for tensor in (part.images, part.labels):
            digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
