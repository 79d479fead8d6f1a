"""Data sets by name, through Hugging Face `datasets` and its cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speedk.data.catalogue import Hub
from speedk.data.parquet import encoded, read_parquet
from speedk.data.part import BLOCK, Encoded, Part, Rows, number_labels
from speedk.errors import DataError, one_line

if TYPE_CHECKING:
    import datasets



class HubRows(Rows):
    """Rows of a `datasets.Dataset` whose images are left encoded: they are decoded by the same rules as local files."""

    def __init__(self, title: str, names: tuple[str, ...], labels: np.ndarray, dataset: datasets.Dataset,
                 image: str) -> None:
        super().__init__(title, names, labels)
        self.dataset, self.image = dataset, image

    def blocks(self) -> Iterator[list[Encoded]]:
        table = self.dataset.select_columns(self.image).with_format("arrow")
        for start in range(0, len(self.rows), BLOCK):
            rows = self.rows[start:start + BLOCK]
            column = table[rows.tolist()].column(0).combine_chunks()
            found = encoded(column, np.arange(len(rows)), "", 0)
            yield [(f"{self.title} row {row}", data) for row, (_, data) in zip(rows.tolist(), found, strict=True)]


def read_hub(hub: Hub, name: str, download: str, resolution: int, progress: bool = True) -> tuple[Part, Part]:
    """The training and the test part of `hub`, downloaded on first use.

    Raises DataError, in one line that says what to fetch by hand (`download`), where `datasets` is not installed, or
    the data are not in its cache and the hub cannot be reached.
    """
    try:
        import datasets  # noqa: F401
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise DataError(f"{name} comes through the package `datasets`, which is not installed: pip "
                        f"install 'speedk[hub]'; or {download}, and give it: --data DIR (data= in Python)") from None
    if progress:
        print(f"{name}: from {hub.repository} through Hugging Face datasets{hub.warning}", file=sys.stderr)
    try:
        fetched = _snapshot(hub, resolution) if hub.files else _load(hub)
    # Several libraries lie below, and what they raise for the same trouble changes from version to version.
    except Exception as error:
        raise DataError(f"{name} is not in the cache of `datasets` and could not be fetched "
                        f"({one_line(error)}): {download}, and give it: --data DIR (data= in Python)"
                        ) from error
    if hub.files:
        return read_parquet(*fetched)
    return _rows(hub, dict(zip(("training", "test"), fetched, strict=True)))


def _load(hub: Hub) -> tuple[datasets.Dataset, datasets.Dataset]:
    from datasets import load_dataset

    found = load_dataset(hub.repository)
    for split in (hub.train, hub.test):
        if split not in found:
            raise LookupError(f"{hub.repository} holds the splits {', '.join(found)}, not {split!r}")
    return found[hub.train], found[hub.test]


def _snapshot(hub: Hub, resolution: int) -> tuple[list[Path], list[Path]]:
    """The parquet files themselves, in the cache that `datasets` shares: fastai's sets, whose repositories hold a
    loading script that `datasets` refuses beside a parquet export that it does not find without a network, and
    ImageNet, which it would first copy whole to take ten classes out of it."""
    from huggingface_hub import snapshot_download

    # fastai's releases: the shortest side is 160 or 320 pixels, or as it was.
    size = "160px" if resolution <= 160 else "320px" if resolution <= 320 else "full_size"
    patterns = [pattern.format(size=size) for pattern in (hub.train, hub.test)]
    folder = Path(snapshot_download(hub.repository, repo_type="dataset", revision=hub.revision,
                                    allow_patterns=patterns))
    train, test = (sorted(folder.glob(pattern)) for pattern in patterns)
    if not train or not test:
        raise FileNotFoundError(f"no files like {patterns[0 if not train else 1]} in {hub.repository}")
    return train, test


def _rows(hub: Hub, parts: dict[str, datasets.Dataset]) -> tuple[Part, Part]:
    from datasets import Image

    for part in parts.values():
        for column in (hub.image, hub.label):
            if column not in part.features:
                raise DataError(f"{hub.repository} has no column {column!r}: it has {', '.join(part.features)}")
    names = {title: getattr(part.features[hub.label], "names", None) for title, part in parts.items()}
    values = {title: np.asarray(part.with_format("numpy")[hub.label][:]) for title, part in parts.items()}
    labels, class_names = number_labels(values, names)
    training, test = (HubRows(title, class_names, labels[title], part.cast_column(hub.image, Image(decode=False)),
                              hub.image) for title, part in parts.items())
    return training, test
