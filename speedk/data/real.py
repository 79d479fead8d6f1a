"""Real images in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from speedk.data.normaliser import Normaliser
from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.registry import nearest

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
    cut: bool = False
    """Whether `only` took these classes out of a larger set."""

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

    def only(self, wanted: Sequence[str]) -> RealData:
        """The classes `wanted`, by name or number, numbered from 0 in that order, under the normalisation of the whole
        set. Raises ConfigError for a class that there is not, one that is named twice, and fewer than two."""
        places = {str(i): i for i in range(len(self.class_names))}
        places |= {name: i for i, name in enumerate(self.class_names)}
        for name in wanted:
            if name not in places:
                raise ConfigError(f"{self.name} has no class {name!r}, by name or by number from 0 to "
                                  f"{len(self.class_names) - 1}{nearest(name, list(self.class_names))}")
        chosen = [places[name] for name in wanted]
        if len(set(chosen)) < max(2, len(chosen)):
            raise ConfigError(f"classes={','.join(wanted)} must be two or more, none of them twice")
        names = tuple(self.class_names[i] for i in chosen)
        train, test = (_numbered(part.to("cpu"), chosen, len(self.class_names)) for part in (self.train, self.test))
        note = "; ".join(filter(None, (self.note, f"{len(chosen)} of its {len(self.class_names)} classes")))
        part = dataclasses.replace(self, geometry=dataclasses.replace(self.geometry, classes=len(chosen)), note=note,
                                   class_names=names, fingerprint=fingerprint(names, train, test), train=train,
                                   test=test, cut=True)
        return part.to(self.train.images.device)

    def to(self, device: torch.device | str) -> RealData:
        """The same data with its uint8 images and its labels on `device`; itself where they are there."""
        if torch.empty(0, device=device).device == self.train.images.device == self.test.images.device:
            return self
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def describe(self) -> dict[str, Any]:
        """JSON for reports and for the artifact's header."""
        return {"name": self.name, "split": self.split, "note": self.note, "fingerprint": self.fingerprint,
                "train": len(self.train), "test": len(self.test),
                **({"classes": list(self.class_names)} if self.cut else {})}

    def _subset(self, part: Name) -> Subset:
        if part not in ("train", "test"):
            raise ValueError(f"part {part!r} is neither 'train' nor 'test'")
        return self.train if part == "train" else self.test


def listed(classes: str) -> list[str]:
    """"dog, 3, 10-12" -> ["dog", "3", "10", "11", "12"], for `RealData.only`. Raises ConfigError for "12-10"."""
    found: list[str] = []
    for word in filter(None, map(str.strip, classes.split(","))):
        numbers = re.fullmatch(r"(\d{1,6})-(\d{1,6})", word)
        if numbers and int(numbers[2]) < int(numbers[1]):
            raise ConfigError(f"classes={classes}: {word} has no class in it, as its first number is the larger one")
        found += [word] if not numbers else map(str, range(int(numbers[1]), int(numbers[2]) + 1))
    return found


def _numbered(part: Subset, chosen: Sequence[int], classes: int) -> Subset:
    """The images of the classes `chosen`, which are numbered in that order."""
    number = torch.full((classes,), -1)
    number[torch.tensor(chosen)] = torch.arange(len(chosen))
    labels = number[part.labels]
    return Subset(part.images[labels >= 0], labels[labels >= 0])


def fingerprint(class_names: tuple[str, ...], *parts: Subset) -> str:
    """sha256, hexadecimal, over the class names and each part's shape, images and labels."""
    digest = hashlib.sha256(json.dumps([list(class_names), *(list(part.images.shape) for part in parts)]).encode())
    for part in parts:
        for tensor in (part.images, part.labels):
            digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()
