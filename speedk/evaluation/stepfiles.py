"""A folder with a distilled file for each step of continual learning, read as one source."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from speedk.distillation import runfiles
from speedk.errors import DataError
from speedk.evaluation import sources

if TYPE_CHECKING:
    from speedk.data import RealData


def read(path: Path, real: RealData, rate: float | None = None,
           standardisation: str | None = None) -> tuple[sources.Source, list[list[int]]]:
    """The distilled files in `path`, or of the run directories in it, in the order of their names, as one source, and
    the classes of each.

    Where a file's normaliser is another than that of `real`, its pictures (clipped to 0 to 1) are normalised anew.
    rate, standardisation: what is trained with in place of the files' own, which must be one for all otherwise.
    Raises DataError where a class is not one of `real`, is in two files or in none, or the images are of another size.
    """
    from speedk.distillation import artifact

    files = sorted(path.glob("*.safetensors"), key=_natural)
    files = files or sorted(path.glob(f"*/{runfiles.DISTILLED}"), key=lambda file: _natural(file.parent))
    if not files:
        raise DataError(f"{path} holds no distilled files (.safetensors), one for each step")
    known = {name: i for i, name in enumerate(real.class_names)}
    parts: list[list[int]] = []
    images, labels, storage, rates, standards = [], [], {}, set(), set()
    for file in files:
        found = artifact.load(file)
        if dataclasses.replace(found.geometry, classes=real.geometry.classes) != real.geometry:
            raise DataError(f"{file} holds images of {found.geometry.shape}, but {real.name} has "
                            f"{real.geometry.shape}")
        for name in found.class_names:
            if name not in known:
                raise DataError(f"{file} holds the class {name!r}, which {real.name} does not have")
            if any(known[name] in part for part in parts):
                raise DataError(f"{file} holds the class {name!r}, which an earlier file holds too")
        parts.append([known[name] for name in found.class_names])
        same = found.header["normaliser"] == real.normaliser.describe()
        images.append(found.images() if same else real.normaliser.normalise(found.images("unit")))
        labels.append(torch.tensor(parts[-1])[found.classes])
        for part, numbers, _ in found.storage():
            storage[part] = storage.get(part, 0) + numbers
        rates.add(found.header["objective"].get("lr"))
        standards.add(found.header["protocol"])
    if missing := [name for name, i in known.items() if not any(i in part for part in parts)]:
        raise DataError(f"no file of {path} holds the class {missing[0]!r}")
    if (len(rates) > 1 and rate is None) or (len(standards) > 1 and standardisation is None):
        said = ", ".join(sorted(map(str, rates))), ", ".join(sorted(standards))
        raise DataError(f"the files of {path} were made for different rates ({said[0]}) or protocols ({said[1]}): say "
                        "one for all of them (--rate, --standardisation)")
    classes = torch.cat(labels)
    return sources.Source(str(path), sources.fixed(torch.cat(images), classes), len(classes),
                          rate=rates.pop() if rate is None else rate,
                          standardisation=standardisation or standards.pop(), storage=storage), parts


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which step-2 comes before step-10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path.name)]
