"""Parquet files with an image and a label column, in the layout that Hugging Face `datasets` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from speedk.data.part import BLOCK, Encoded, Part, Rows, number_labels
from speedk.errors import DataError, one_line

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "cls")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)\.parquet", re.IGNORECASE)
_ARROW_ERRORS = (pa.ArrowException, OSError)


class ParquetRows(Rows):
    """The rows of a list of shards, in their order."""

    def __init__(self, title: str, names: tuple[str, ...], labels: np.ndarray, files: Sequence[Path],
                 image: str) -> None:
        super().__init__(title, names, labels)
        self.files, self.image = tuple(files), image

    def blocks(self) -> Iterator[list[Encoded]]:
        first = 0
        for path in self.files:
            try:
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        count = file.metadata.row_group(group).num_rows
                        if self._taken(first, count).size:
                            yield from self._group(file, path, group, first)
                        first += count
            except _ARROW_ERRORS as error:
                raise DataError(f"cannot read {path}: {one_line(error)}") from None

    def _taken(self, first: int, count: int) -> np.ndarray:
        low, high = np.searchsorted(self.rows, (first, first + count))
        return self.rows[low:high] - first

    def _group(self, file: pq.ParquetFile, path: Path, group: int, first: int) -> Iterator[list[Encoded]]:
        for batch in file.iter_batches(BLOCK, row_groups=[group], columns=[self.image]):
            taken = self._taken(first, batch.num_rows)
            if taken.size:
                yield encoded(batch.column(0), taken, f"{path.name} row", first)
            first += batch.num_rows


def read_parquet(train: Sequence[Path], test: Sequence[Path]) -> tuple[Part, Part]:
    """The two parts of a parquet data set, from its shards. Raises DataError."""
    files = {"training": list(train), "test": list(test)}
    for shards in files.values():
        _check_shards(shards)
    columns = {title: _columns(shards) for title, shards in files.items()}
    values = {title: _labels(files[title], label) for title, (_, label, _) in columns.items()}
    labels, names = number_labels(values, {title: found for title, (_, _, found) in columns.items()})
    training, testing = (ParquetRows(title, names, labels[title], files[title], columns[title][0]) for title in files)
    return training, testing


def _check_shards(shards: list[Path]) -> None:
    """Every shard that the names of the others announce is there."""
    seen: dict[tuple, set[int]] = {}
    for match in filter(None, (_SHARD.fullmatch(path.name) for path in shards)):
        seen.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    for (stem, count), numbers in seen.items():
        lacking = sorted(set(range(count)) - numbers) if count <= 100_000 else []
        if lacking:
            raise DataError(f"{shards[0].parent} holds {len(numbers)} of {count} shards of {stem}: "
                            f"{stem}-{lacking[0]:05d}-of-{count:05d}.parquet is missing")


def encoded(column: pa.Array, taken: np.ndarray, where: str, first: int) -> list[Encoded]:
    """The images of the rows `taken` of an arrow column: a struct of bytes and path, or bytes alone."""
    data = column.field("bytes") if pa.types.is_struct(column.type) else column
    # A row that is null as a whole may have leftovers in its fields, so validity is asked of the row itself.
    return [(f"{where} {first + row}", data[row].as_py() if column[row].is_valid else None) for row in taken.tolist()]


def label_values(column: pa.ChunkedArray | pa.Array, where: str) -> np.ndarray:
    """A label column as an int64 or string array. DataError for nulls and for other types."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(f"row {row} of {where} has no label")
    if pa.types.is_integer(kind):
        return np.asarray(column.to_pylist() if kind == pa.uint64() else column.cast(pa.int64()), dtype=np.int64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return np.array(column.to_pylist(), dtype=np.str_)
    raise DataError(f"the label column of {where} holds {kind}: labels must be whole numbers or strings")


def _columns(files: Sequence[Path]) -> tuple[str, str, tuple[str, ...] | None]:
    """The image column, the label column, and the class names, if stored; the same in every shard."""
    found = first = None
    for path in files:
        try:
            schema = pq.read_schema(path)
        except _ARROW_ERRORS as error:
            raise DataError(f"cannot read {path}: {one_line(error)}") from None
        image = _pick(schema, IMAGE_COLUMNS, path, "image")
        kind = schema.field(image).type
        data = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(data) or pa.types.is_large_binary(data)):
            raise DataError(f"the column {image!r} of {path} holds {kind}: images must be stored as encoded bytes")
        label = _pick(schema, LABEL_COLUMNS, path, "label")
        found = (image, label, _stored_names(schema, label))
        first = first or (found, schema.field(label).type)
        if first != (found, schema.field(label).type):
            raise DataError(f"the columns or class names of {path} are not those of {files[0].name}")
    return found


def _pick(schema: pa.Schema, known: Sequence[str], path: Path, what: str) -> str:
    for name in known:
        if name in schema.names:
            return name
    raise DataError(f"{path} has no {what} column: it has {', '.join(schema.names)}, and one of {', '.join(known)} "
                    "is looked for")


def _stored_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    # Older files store the names as a dictionary from "0", "1", ...
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _labels(files: Sequence[Path], label: str) -> np.ndarray:
    found = []
    for path in files:
        try:
            column = pq.read_table(path, columns=[label], partitioning=None).column(0)
        except _ARROW_ERRORS as error:
            raise DataError(f"cannot read {path}: {one_line(error)}") from None
        found.append(label_values(column, path.name))
    return np.concatenate(found)


