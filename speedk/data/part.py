"""One part (training or test) of a data set as it is stored: labels at hand, images still encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from speedk.errors import DataError

BLOCK = 256
"""Images that a reader hands on at a time, about."""

Encoded = tuple[str, "bytes | Path | None"]
"""Where an image lies, in words for a message, and its bytes or its file; None where the row holds none."""


def storable(name: str) -> bool:
    """Whether `name` may be a class's: a distilled file says it, and a terminal shows it."""
    return 0 < len(name) <= 200 and name.isprintable()


class Part:
    """The interface of a reader: `names`, `labels`, `cut` and `blocks`, all in the same order of images."""

    title: str
    """"training" or "test", for messages."""
    names: tuple[str, ...]
    labels: np.ndarray
    """int64 [M], each in 0 .. len(names) - 1."""

    def cut(self, wanted: Sequence[int]) -> Part:
        """Only the images of the classes `wanted`, which are numbered from 0 in that order."""
        raise NotImplementedError

    def blocks(self) -> Iterator[list[Encoded]]:
        """All images in order, about BLOCK at a time, so that no more than a block is in memory."""
        raise NotImplementedError


class Rows(Part):
    """A part whose images are rows of a table: `rows` (sorted) are the ones that belong to it."""

    def __init__(self, title: str, names: tuple[str, ...], labels: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.title, self.names, self.labels = title, names, labels
        self.rows = np.arange(len(labels)) if rows is None else rows

    def cut(self, wanted: Sequence[int]) -> Rows:
        number = np.full(len(self.names), -1)
        number[list(wanted)] = np.arange(len(wanted))
        labels = number[self.labels]
        kept = labels >= 0
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        Rows.__init__(part, self.title, tuple(self.names[i] for i in wanted), labels[kept], self.rows[kept])
        return part


def number_labels(values: dict[str, Sequence], names: dict[str, Sequence[str] | None]
                  ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels as class numbers, and the classes' names, for parts (by title, the training part first).

    `values` are integers or strings as stored; `names` are the class names stored beside them, or None. Without
    stored names the classes are the distinct values of the training part, sorted. Raises DataError for a label
    outside the classes, for values of another kind, and where the parts' class names differ.
    """
    stored = {title: tuple(found) for title, found in names.items() if found is not None}
    if len(set(stored.values())) > 1:
        (first, a), (second, b) = stored.items()
        only = sorted(set(a) ^ set(b))[:5]
        how = f"only one has {', '.join(map(repr, only))}" if only else "they are in another order"
        raise DataError(f"the class names of the {first} and the {second} part disagree: {how}")
    arrays = {title: np.asarray(found) for title, found in values.items()}
    for title, array in arrays.items():
        if array.dtype.kind not in "iuU":
            raise DataError(f"the labels of the {title} part are {array.dtype}: they must be whole numbers or strings")
    if len({array.dtype.kind == "U" for array in arrays.values()}) > 1:
        raise DataError("the labels of one part are strings and those of the other are numbers")

    first = next(iter(arrays.values()))
    if first.dtype.kind == "U":
        classes = next(iter(stored.values())) if stored else tuple(np.unique(first).tolist())
        known: dict = {name: i for i, name in enumerate(classes)}
    elif stored:
        classes = next(iter(stored.values()))
        known = {i: i for i in range(len(classes))}
    else:
        distinct = np.unique(first).tolist()
        classes = tuple(map(str, distinct))
        known = {value: i for i, value in enumerate(distinct)}
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"two classes have the same name, {twice!r}")
    return {title: _numbered(title, array, known, classes) for title, array in arrays.items()}, classes


def _numbered(title: str, array: np.ndarray, known: dict, classes: tuple[str, ...]) -> np.ndarray:
    distinct, inverse = np.unique(array, return_inverse=True)
    numbers = np.array([known.get(value, -1) for value in distinct.tolist()], dtype=np.int64)
    if (numbers < 0).any():
        bad = distinct[numbers < 0].tolist()[0]
        row = int(np.flatnonzero(array == bad)[0])
        hint = " (hidden labels: is this an unlabelled test set?)" if bad == -1 else ""
        raise DataError(f"label {bad!r} of row {row} of the {title} part is not one of the {len(classes)} "
                        f"classes{hint}")
    return numbers[inverse].astype(np.int64)
