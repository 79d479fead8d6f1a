"""Data sets by name, through Hugging Face `datasets` and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from speedk.data.catalogue import Hub
from speedk.data.part import Encoded, Part, Rows, number_labels
from speedk.errors import DataError

if TYPE_CHECKING:
    import datasets

_BLOCK = 256


class HubRows(Rows):
    """Rows of a `datasets.Dataset`, images still encoded."""

    def __init__(self, title: str, names: tuple[str, ...], labels: np.ndarray, dataset: datasets.Dataset,
                 image: str) -> None:
        super().__init__(title, names, labels)
        self.dataset, self.image = dataset, image

    def blocks(self) -> Iterator[list[Encoded]]:
        from speedk.data.parquet import encoded

        table = self.dataset.select_columns(self.image).with_format("arrow")
        for start in range(0, len(self.rows), _BLOCK):
            rows = self.rows[start:start + _BLOCK]
            column = table[rows.tolist()].column(0).combine_chunks()
            found = encoded(column, np.arange(len(rows)), f"{self.title} row", 0)
            yield [(f"{self.title} row {row}", data) for row, (_, data) in zip(rows.tolist(), found, strict=True)]


def read_hub(hub: Hub, name: str, download: str, resolution: int, classes: Sequence[int] | None = None
             ) -> tuple[Part, Part]:
    """The training and test part of `hub`, downloaded on first use.

    `classes`: only rows with these labels are kept on disk (ImageNet is 150 GB). Raises DataError, in one line that
    says what to fetch by hand, where `datasets` is not installed or the hub cannot be reached.
    """
    by_hand = f"{download}, and give it: --data DIR (path= in Python)"
    try:
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise DataError(f"{name} comes through the package `datasets`, which is not installed: pip install datasets; "
                        f"or {by_hand}") from None
    try:
        parts = _load(datasets, hub, resolution, classes)
    except (OSError, DatasetsError, HfHubHTTPError, RuntimeError, ValueError) as error:
        raise DataError(f"{name} is not in the cache of `datasets` and could not be fetched "
                        f"({' '.join(str(error).split())[:200]}): {by_hand}") from None
    values, names = {}, {}
    for title, part in parts.items():
        for column in (hub.image, hub.label):
            if column not in part.features:
                raise DataError(f"{hub.repository} has no column {column!r}: it has {', '.join(part.features)}")
        names[title] = getattr(part.features[hub.label], "names", None)
        values[title] = np.asarray(part.with_format("numpy")[hub.label][:])
    labels, class_names = number_labels(values, names)
    training, test = (HubRows(title, class_names, labels[title], _undecoded(datasets, part, hub.image), hub.image)
                      for title, part in parts.items())
    return training, test


def _load(datasets: Any, hub: Hub, resolution: int, classes: Sequence[int] | None) -> dict[str, datasets.Dataset]:
    if not hub.files:
        found = datasets.load_dataset(hub.repository)
        return {"training": found[hub.train], "test": found[hub.test]}
    # fastai's releases: the shortest side is 160 or 320 pixels, or as it was.
    size = "160px" if resolution <= 160 else "320px" if resolution <= 320 else "full_size"
    revision = f"@{hub.revision.replace('/', '%2F')}" if hub.revision else ""
    base = f"hf://datasets/{hub.repository}{revision}"
    files = {"train": f"{base}/{hub.train.format(size=size)}", "test": f"{base}/{hub.test.format(size=size)}"}
    only = {"filters": [(hub.label, "in", list(classes))]} if classes else {}
    found = datasets.load_dataset("parquet", data_files=files, **only)
    return {"training": found["train"], "test": found["test"]}


def _undecoded(datasets: Any, part: datasets.Dataset, image: str) -> datasets.Dataset:
    """The images as the bytes that are stored: they are decoded here, by the same rules as local files."""
    return part.cast_column(image, datasets.Image(decode=False))
