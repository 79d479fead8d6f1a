"""`load`: a name, a folder, or a name with a folder, to RealData."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from speedk.data import catalogue, digits, zca
from speedk.data.catalogue import ILSVRC_CLASSES, ILSVRC_DOWNLOAD, ILSVRC_HUB, ILSVRC_TEST_PER_CLASS, Entry
from speedk.data.decode import Decoded, decode, side_of
from speedk.data.locate import locate, place
from speedk.data.normaliser import ChannelNormaliser, Normaliser, channel_statistics
from speedk.data.part import Part, storable
from speedk.data.real import RealData, Subset, fingerprint
from speedk.errors import ConfigError, DataError, one_line
from speedk.geometry import MAX_RESOLUTION, Geometry

NORMALISERS = ("channel", "zca")


def load(name: str | None = None, path: str | Path | None = None, *, resolution: int | None = None,
         split: str | None = None, normaliser: str | None = None, progress: bool = True) -> RealData:
    """Real data, by name, from a folder, or both.

    - `name` alone: `digits` is embedded; the others come through Hugging Face `datasets`.
    - `path` alone: any folder with parquet files or an image folder tree. Without `resolution` (side, pixels) its
      images must be square and of one size; with it they are stretched to it.
    - both: the named data set from local files, with its resolution, normaliser and class order; where `path` has a
      folder of that name, from there. The six ImageNet subsets are cut by class index out of a whole ImageNet; a folder
      of just their ten classes is taken as it is.

    `split`: "ilsvrc" takes imagenette and imagewoof from ImageNet, as the paper does, "fastai" (their default) from
    fastai's releases; None takes what is there. `normaliser`: "channel" or "zca" instead of the data set's own.
    Raises DataError for data that are missing, unreadable or unfit, ConfigError for options that do not exist.
    """
    if name is None and path is None:
        raise ConfigError("give the name of a data set or a folder")
    entry = catalogue.entry(name) if name is not None else None
    if normaliser not in (None, *NORMALISERS):
        raise ConfigError(f"normaliser {normaliser!r} is not one of {', '.join(NORMALISERS)}")
    if resolution is not None and (type(resolution) is not int or not 1 <= resolution <= MAX_RESOLUTION):
        raise ConfigError(f"resolution {resolution!r} is not a number of pixels from 1 to {MAX_RESOLUTION}")
    _check_split(entry, split)
    if entry is not None and entry.hub is None:
        if path is not None:
            raise ConfigError(f"{name} is embedded: it takes no folder; give the folder alone to use your own images")
        return _digits(entry, resolution or entry.geometry.resolution, normaliser, progress)
    if entry is None:
        return _own(Path(path), resolution, normaliser, progress)
    side = resolution or entry.geometry.resolution
    train, test, used = _named(entry, None if path is None else place(Path(path), name), side, split, progress)
    training, testing = (decode(part, side, progress=progress) for part in _checked(train, test))
    notes = _notes(side, {"training": training, "test": testing})
    if entry.name.startswith("cifar") and "JPEG" in training.formats | testing.formats:
        notes.append("the images were stored as JPEG: they are not pixel-identical to the published ones")
    chosen = normaliser or entry.normaliser
    statistics = ChannelNormaliser(*entry.statistics) if chosen == "channel" and entry.statistics else None
    return _assemble(entry.name, train.names, used, notes, training, testing, 3, chosen, statistics, progress)


def _digits(entry: Entry, side: int, normaliser: str | None, progress: bool) -> RealData:
    (train, train_labels), (test, test_labels) = digits.load_digits(side)
    note = f"{digits.SIDE}x{digits.SIDE} originals resized to {side}x{side}: each holds {digits.SIDE**2} values"
    training, testing = (Decoded(images, labels, True, frozenset(), digits.SIDE, [])
                         for images, labels in ((train, train_labels), (test, test_labels)))
    return _assemble(entry.name, tuple("0123456789"), entry.split, [note] * (side != digits.SIDE), training, testing, 1,
                     normaliser or entry.normaliser, None, progress)


def _own(path: Path, resolution: int | None, normaliser: str | None, progress: bool) -> RealData:
    located = locate(path)
    train, test = _checked(*located.read())
    side = resolution or side_of(train)
    training, testing = (decode(part, side, resolution is not None, progress) for part in (train, test))
    notes = _notes(side, {"training": training, "test": testing})
    if located.unused:
        notes.append(f"the part {located.unused!r} is not used")
    channels = 1 if training.grey and testing.grey else 3
    return _assemble(one_line(path.resolve().name), train.names, "folder", notes, training, testing, channels,
                     normaliser or "channel", None, progress)


def _check_split(entry: Entry | None, split: str | None) -> None:
    if split is None:
        return
    known = [] if entry is None else list(dict.fromkeys([entry.split] + ["ilsvrc"] * bool(entry.ilsvrc)))
    if split not in known:
        of = "a folder's data have no other split than their own" if entry is None else (
            f"{entry.name} has {' and '.join(map(repr, known))}")
        raise ConfigError(f"split {split!r} is not one that can be asked for: {of}")


def _named(entry: Entry, path: Path | None, side: int, split: str | None, progress: bool
           ) -> tuple[Part, Part, str]:
    """The two parts of a named data set, cut to its classes, and the split that they are."""
    if path is not None:
        train, test = locate(path, prefer_validation=not entry.name.startswith("cifar")).read()
    else:
        from speedk.data.hub import read_hub  # `datasets` and pyarrow are imported only for data that need them

        if split == "ilsvrc":
            train, test = read_hub(ILSVRC_HUB, entry.name, ILSVRC_DOWNLOAD, side, progress)
        else:
            train, test = read_hub(entry.hub, entry.name, entry.download, side, progress)
    if entry.ilsvrc and len(train.names) == ILSVRC_CLASSES:
        if split == "fastai":
            raise DataError(f"{path} is a whole ImageNet, which has no fastai split: {entry.download}")
        train, test = train.cut(entry.ilsvrc), test.cut(entry.ilsvrc)
        _check_order(entry, path, train.names)
        train.names = test.names = entry.ilsvrc_names
        return train, test, "ilsvrc"
    if len(train.names) != entry.geometry.classes:
        whole = f", nor the {ILSVRC_CLASSES} of ImageNet" if entry.ilsvrc else ""
        raise DataError(f"{path or entry.hub.repository} has {len(train.names)} classes, not the "
                        f"{entry.geometry.classes} of {entry.name}{whole}")
    if entry.wnids and set(train.names) == set(entry.wnids):
        train.names = test.names = tuple(entry.ilsvrc_names[entry.wnids.index(name)] for name in train.names)
    return train, test, _recognised(entry, path, train, test, split)


def _check_order(entry: Entry, path: Path | None, names: tuple[str, ...]) -> None:
    """The classes cut by index are ImageNet's: WordNet numbers, bare indices, or names that are mostly ours. A thousand
    folders sorted by English names would give ten wrong classes silently."""
    if all(re.fullmatch(r"n\d{8}|\d{1,3}", name) for name in names):
        return
    ours, found = ([re.sub(r"[\W_]", "", name).casefold() for name in some] for some in (entry.ilsvrc_names, names))
    if sum(name in words for name, words in zip(ours, found, strict=True)) < len(ours) / 2:
        raise DataError(f"{path or entry.hub.repository} has {ILSVRC_CLASSES} classes, but not in ImageNet's order: "
                        f"class {entry.ilsvrc[0]} is {names[0]!r}, not {entry.ilsvrc_names[0]!r}; name the folders by "
                        "WordNet number (n01440764, ...)")


def _recognised(entry: Entry, path: Path | None, train: Part, test: Part, asked: str | None) -> str:
    """Which split local files are, as far as their counts tell; DataError where it is not the one asked for."""
    counts = (len(train.labels), len(test.labels))
    if entry.counts == counts:
        used = entry.split
    elif entry.ilsvrc and set(np.bincount(test.labels, minlength=len(test.names))) == {ILSVRC_TEST_PER_CLASS}:
        used = "ilsvrc"
    else:
        used = "folder" if path else "hub"
    if asked not in (None, used):
        raise DataError(f"{path or entry.hub.repository} holds {counts[0]} training and {counts[1]} test images: "
                        f"that is not the split {asked!r} of {entry.name}")
    return used


def _checked(train: Part, test: Part) -> tuple[Part, Part]:
    if len(train.names) < 2:
        raise DataError(f"there is one class only, {train.names[0]!r}: a classifier needs two or more"
                        if train.names else "there are no classes")
    for name in train.names:
        if not storable(name):  # found out at the end of a run it would cost the run
            raise DataError(f"the class name {ascii(name)[:80]} cannot be stored: it must be 1 to 200 printable "
                            "characters")
    for part in (train, test):
        _no_empty_class(part.title, part.names, part.labels)
    return train, test


def _no_empty_class(title: str, names: tuple[str, ...], labels: np.ndarray) -> None:
    empty = [names[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)]
    if empty:
        some = ", ".join(map(repr, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise DataError(f"{len(empty)} of {len(names)} classes have no readable {title} image: {some}")


def _notes(side: int, parts: dict[str, Decoded]) -> list[str]:
    """What happened on the way that a reader of a result must know."""
    notes = []
    for title, part in parts.items():
        if part.unreadable:
            some = one_line("; ".join(part.unreadable[:3]), 1000) + ("; ..." if len(part.unreadable) > 3 else "")
            total = len(part.labels) + len(part.unreadable)
            notes.append(f"{len(part.unreadable)} of {total} {title} images left out as unreadable: {some}")
    smallest = min(part.smallest for part in parts.values())
    if smallest < side:
        notes.append(f"images with sides down to {smallest} pixels enlarged to {side}x{side}")
    return notes


def _assemble(name: str, names: tuple[str, ...], split: str, notes: list[str], training: Decoded, testing: Decoded,
              channels: int, kind: str, statistics: Normaliser | None, progress: bool) -> RealData:
    for title, part in (("training", training), ("test", testing)):
        _no_empty_class(title, names, part.labels)
    train, test = (Subset(torch.from_numpy(np.ascontiguousarray(part.images[:, :channels])),
                          torch.from_numpy(part.labels)) for part in (training, testing))
    mark = fingerprint(names, train, test)
    if kind == "zca":
        statistics = zca.fit_or_cached(train.images, mark, progress=progress)
    geometry = Geometry(len(names), channels, train.images.shape[-1])
    return RealData(name, geometry, names, split, "; ".join(notes), mark,
                    statistics or channel_statistics(train.images), train, test)
