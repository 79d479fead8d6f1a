"""Finding the training and the test part in a folder: parquet shards or an image folder tree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from speedk.data.catalogue import CATALOGUE
from speedk.data.folder import read_folders, visible
from speedk.data.part import Part
from speedk.errors import DataError

TRAIN = ("train", "training")
TEST = ("test", "testing", "validation", "valid", "val", "eval")
"""In the order in which a part is looked for: where a folder has several, the first found is the test part."""


@dataclass(frozen=True)
class Located:
    """Where the two parts lie: lists of parquet shards, or one folder each."""

    train: list[Path]
    test: list[Path]
    parquet: bool
    unused: str
    """Name of a further part that could have been the test part, or ""."""

    def read(self) -> tuple[Part, Part]:
        """The training and the test part, labels read, images still encoded."""
        if not self.parquet:
            return read_folders(self.train[0], self.test[0])
        from speedk.data.parquet import read_parquet  # pyarrow is imported only for files that need it

        return read_parquet(self.train, self.test)


def locate(path: Path, prefer_validation: bool = False) -> Located:
    """The two parts in `path`, or in the one folder directly below it that has them.

    `prefer_validation` takes the validation part where there is a test part too: ImageNet's and Tiny ImageNet's test
    labels are not public. Raises DataError where the folder is missing, empty, ambiguous, or lacks a part.
    """
    if not path.exists():
        raise DataError(f"there is no folder {path}")
    if not path.is_dir():
        raise DataError(f"{path} is a file: give the folder that holds the training and the test part")
    below = visible(path)
    if not below:
        raise DataError(f"{path} is empty")
    order = TEST[2:] + TEST[:2] if prefer_validation else TEST
    candidates = [path, *(entry for entry in below if entry.is_dir() and _part(entry.name) is None)]
    found = [(place, parts) for place in candidates if "train" in (parts := _parts(place))]
    if found and found[0][0] != path and len(found) > 1:
        raise DataError(f"{path} holds several data sets, {', '.join(p.name for p, _ in found[:6])}: give one of them")
    if not found:
        raise DataError(f"{path} has no training part: it needs train/ with a folder per class, or train*.parquet")
    place, parts = found[0]
    tests = [name for name in order if name in parts]
    if not tests:
        raise DataError(f"{place} has no test part: it needs test, validation or val beside train")
    train, test = parts["train"], parts[tests[0]]
    if (train[0].suffix.lower() == ".parquet") != (test[0].suffix.lower() == ".parquet"):
        raise DataError(f"{place} has a training and a test part of different kinds: parquet files and an image folder")
    return Located(train, test, train[0].suffix.lower() == ".parquet", tests[1] if len(tests) > 1 else "")


def place(path: Path, name: str) -> Path:
    """The folder of the named data set: the one of its name in `path`, or `path` itself. Raises DataError where `path`
    is a folder of other data sets."""
    if (path / name).is_dir():
        return path / name
    if path.is_dir() and "train" not in _parts(path):
        sets = [entry.name for entry in visible(path)
                if entry.is_dir() and _part(entry.name) is None and "train" in _parts(entry)]
        if len(sets) > 1 or set(sets) & set(CATALOGUE):  # a single one of any other name may well be this set
            raise DataError(f"there is no {name} in {path}, only {', '.join(sets[:6])}")
    return path


def _parts(place: Path) -> dict[str, list[Path]]:
    """Part name -> parquet shards, or the one image folder, directly in `place`."""
    files: dict[str, list[Path]] = {}
    folders: dict[str, list[Path]] = {}
    for entry in visible(place):
        part = _part(entry.stem if entry.suffix.lower() == ".parquet" else entry.name)
        if part is None:
            continue
        if entry.suffix.lower() == ".parquet" and entry.is_file():
            files.setdefault(part, []).append(entry)
        elif entry.is_dir() and part == _whole(entry.name):
            shards = [inner for inner in visible(entry) if inner.suffix.lower() == ".parquet"]
            if shards:
                files.setdefault(part, []).extend(shards)
            else:
                folders.setdefault(part, []).append(entry)
    for part, several in folders.items():
        if len(several) > 1 and part not in files:
            raise DataError(f"{place} holds {' and '.join(e.name for e in several)}: keep one of them as {part}")
    return {**folders, **files}


def _part(name: str) -> str | None:
    """The part that a file or folder name opens with ("train-00000-of-00002" is "train")."""
    return _whole(re.split(r"[-_.]", name, maxsplit=1)[0])


def _whole(name: str) -> str | None:
    name = name.lower()
    return "train" if name in TRAIN else name if name in TEST else None
