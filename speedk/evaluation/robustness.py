"""Accuracy on corrupted test images: the 15 standard corruptions at five severities, made here or read from files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from speedk import corruptions, training
from speedk.corruptions import NAMES, SEVERITIES
from speedk.errors import DataError, one_line
from speedk.training import ImageSet
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.data import RealData

SEED = 0
"""Of the corruptions: every file and every run is tested on the same images."""
VARIANTS = len(NAMES) * len(SEVERITIES)
MADE = "made from the test images (frost is procedural)"


@dataclass(frozen=True)
class Robustness:
    """What networks of one kind get right on corrupted test images, in per cent.

    accuracies: for each corruption, for each severity, one a run, in the order of the runs that finished; clean: of
    the same runs on the test images as they are; failed: whether a run is missing, so that there are no means.
    """

    network: str
    clean: list[float]
    accuracies: dict[str, list[list[float]]]
    failed: bool = False

    def of(self, name: str) -> float | None:
        """The mean accuracy under a corruption, over severities and runs."""
        return None if self.failed else statistics.fmean(a for runs in self.accuracies[name] for a in runs)

    def severity(self, name: str, severity: int) -> float | None:
        """The mean accuracy under a corruption of one severity, over runs."""
        return None if self.failed else statistics.fmean(self.accuracies[name][severity - 1])

    @property
    def runs(self) -> list[float]:
        """The mean over all corruptions and severities of each run."""
        return [statistics.fmean(runs[i] for by_severity in self.accuracies.values() for runs in by_severity)
                for i in range(len(self.clean))]

    @property
    def mean(self) -> float | None:
        """Over all corruptions, severities and runs."""
        return None if self.failed else statistics.fmean(self.runs)

    @property
    def std(self) -> float | None:
        """The population standard deviation over runs of the mean over all corruptions and severities."""
        return None if self.failed else statistics.pstdev(self.runs)

    def to_dict(self) -> dict[str, Any]:
        each = {name: {"mean": self.of(name), "severities": [self.severity(name, s) for s in SEVERITIES],
                       "accuracies": self.accuracies[name]} for name in self.accuracies}
        return {"network": self.network, "mean": self.mean, "std": self.std, "clean": self.clean, "corruptions": each}


@dataclass(frozen=True)
class Variants:
    """Corrupted versions of a test set, one at a time. source: where they come from, in words."""

    source: str
    _fetch: Callable[[str, int], tuple[Tensor, Tensor]]
    """uint8 [N, C, H, W] and labels int64 [N] of a corruption and a severity."""

    def sets(self, real: RealData) -> Iterator[tuple[str, int, ImageSet]]:
        """Each corruption, severity and normalised image set, on the device where `real` is."""
        device = real.test.labels.device
        for name in NAMES:
            for severity in SEVERITIES:
                images, labels = (t.to(device) for t in self._fetch(name, severity))
                yield name, severity, ImageSet(lambda index, images=images: real.normaliser.normalise(images[index]),
                                               labels)


def made(real: RealData) -> Variants:
    """Of the test images of `real`."""
    images, labels = real.test.images.cpu(), real.test.labels
    return Variants(MADE, lambda name, severity: (corruptions.corrupt(images, name, severity, SEED), labels))


def read(folder: Path, real: RealData) -> Variants:
    """Of a folder as CIFAR-10-C and CIFAR-100-C are published: NAME.npy, uint8 [5 N, H, W, C], the severities one after
    another, and labels.npy. Other files are left alone. Raises DataError for what is missing or does not fit `real`."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of corrupted images (NAME.npy and labels.npy)")
    g = real.geometry
    labels = _array(folder / "labels.npy")
    arrays = {name: _array(folder / f"{name}.npy") for name in NAMES}
    count = len(labels) // len(SEVERITIES) if labels.ndim == 1 else 0
    if count == 0 or len(labels) % len(SEVERITIES) or labels.dtype.kind not in "ui":
        raise DataError(f"{folder}/labels.npy holds {labels.dtype} {list(labels.shape)}, not a whole number for each "
                        "image of five severities")
    if int(labels.min()) < 0 or int(labels.max()) >= g.classes:
        raise DataError(f"{folder}/labels.npy holds labels from {labels.min()} to {labels.max()}, but {real.name} has "
                        f"the classes 0 to {g.classes - 1}")
    expected = (len(labels), g.resolution, g.resolution, g.channels)
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.shape != expected:
            raise DataError(f"{folder}/{name}.npy holds {array.dtype} {list(array.shape)}, but {real.name} needs uint8 "
                            f"{list(expected)}")
    known = torch.from_numpy(np.array(labels, np.int64))

    def fetch(name: str, severity: int) -> tuple[Tensor, Tensor]:
        rows = slice((severity - 1) * count, severity * count)
        images = np.ascontiguousarray(arrays[name][rows].transpose(0, 3, 1, 2))
        return torch.from_numpy(images), known[rows]

    return Variants(f"read from {folder}", fetch)


def measure(networks: Sequence[nn.Module], variants: Variants, real: RealData, pool: Pool, *, batch: int,
            standardise: bool, precision: str = "float32", on_variant: Callable[[], None] = lambda: None
            ) -> dict[str, list[list[float]]]:
    """For each corruption and severity the accuracy of each network, in per cent."""
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for name, _, data in variants.sets(real):
        right = training.accuracies(networks, data, pool, batch=batch, standardise=standardise,
                                    precision=precision)
        found[name].append([round(100 * a, 6) for a in right])
        on_variant()
    return found


def _array(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped, not read. Raises DataError, one line."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: all of {', '.join(NAMES)} and labels are needed") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged, or not a NumPy array: {one_line(error)}") from None
