"""Image folders: one folder per class, or Tiny ImageNet's annotated validation folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from speedk.data.part import BLOCK, Encoded, Part
from speedk.errors import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff",
                      ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga"))
"""Of the files that are images; others in a class folder are left alone."""
_ANNOTATIONS = "val_annotations.txt"


class ClassFolders(Part):
    """Images under `root`/<class>/, at any depth below it; classes sorted by name, files sorted by path. The files of
    a class are listed only when its labels or images are asked for: cutting ten classes out of a thousand is cheap."""

    def __init__(self, title: str, root: Path, folders: Sequence[Path]) -> None:
        self.title, self.root, self.folders = title, root, tuple(folders)
        self.names = tuple(folder.name for folder in self.folders)

    def cut(self, wanted: Sequence[int]) -> ClassFolders:
        return ClassFolders(self.title, self.root, [self.folders[i] for i in wanted])

    @cached_property
    def files(self) -> list[list[Path]]:
        return [list(_images(folder)) for folder in self.folders]

    @cached_property
    def labels(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.files)), [len(files) for files in self.files])

    def blocks(self) -> Iterator[list[Encoded]]:
        return _file_blocks([path for files in self.files for path in files], self.root)


class AnnotatedFolder(Part):
    """The validation part of tiny-imagenet-200: images/ and a table that names each file's class."""

    def __init__(self, title: str, root: Path, names: tuple[str, ...]) -> None:
        self.title, self.root, self.names = title, root, names
        table = root / _ANNOTATIONS
        lines = [line.split("\t")[:2] for line in table.read_text("utf-8", "replace").splitlines() if line.strip()]
        number = {name: i for i, name in enumerate(names)}
        bad = next((i for i, line in enumerate(lines) if len(line) < 2 or line[1] not in number), None)
        if bad is not None:
            raise DataError(f"line {bad + 1} of {table} names no class of the training part")
        # Only the last component counts, so that a table cannot point out of the folder.
        self.paths = [root / "images" / Path(name).name for name, _ in lines]
        self.labels = np.array([number[label] for _, label in lines], dtype=np.int64)

    def cut(self, wanted: Sequence[int]) -> Part:
        raise DataError(f"{self.root} is an annotated folder: classes are not cut out of it")

    def blocks(self) -> Iterator[list[Encoded]]:
        return _file_blocks(self.paths, self.root)


def read_folders(train: Path, test: Path) -> tuple[Part, Part]:
    """The two parts of an ImageFolder tree. Raises DataError where a part has no class folders or the parts' classes
    are not the same."""
    training = ClassFolders("training", train, _class_folders(train))
    if (test / _ANNOTATIONS).is_file():
        return training, AnnotatedFolder("test", test, training.names)
    testing = ClassFolders("test", test, _class_folders(test))
    if training.names != testing.names:
        missing = [name for name in training.names if name not in set(testing.names)]
        extra = [name for name in testing.names if name not in set(training.names)]
        said = [f"{where.name}/ has no {', '.join(map(repr, names[:5]))}"
                for where, names in ((test, missing), (train, extra)) if names]
        raise DataError(f"the class folders of {train} and {test} disagree: {'; '.join(said)}")
    return training, testing


def visible(folder: Path) -> list[Path]:
    """The entries of `folder`, sorted by name, but for hidden ones and the litter of archives. Raises DataError."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and entry.name != "__MACOSX")
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from None


def _class_folders(part: Path) -> list[Path]:
    folders = [entry for entry in visible(part) if entry.is_dir()]
    if not folders:
        raise DataError(f"{part} holds no class folders: put each class's images in a folder of its own")
    return folders


def _images(folder: Path) -> Iterator[Path]:
    for parent, below, files in os.walk(folder):
        below.sort()
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(parent, name)


def _file_blocks(paths: Sequence[Path], root: Path) -> Iterator[list[Encoded]]:
    for start in range(0, len(paths), BLOCK):
        yield [(str(path.relative_to(root)), path) for path in paths[start:start + BLOCK]]
