"""Images and labels from the files of other code bases: .npz and .parquet. Nothing in a file is run."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from speedk.errors import ArtifactError, DataError, one_line
from speedk.evaluation import sources

if TYPE_CHECKING:
    from speedk.data import RealData

_LIMIT = 8 << 30
"""Bytes of images and labels that are read at most."""
_BROKEN = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, SyntaxError, TypeError,
           OverflowError, MemoryError, RecursionError, AttributeError, struct.error, zlib.error, zipfile.BadZipFile,
           zipfile.LargeZipFile, tokenize.TokenError)
"""What zipfile and numpy raise on damaged archives."""


def npz(path: Path, real: RealData) -> sources.Source:
    """The arrays `images` and `labels` of a NumPy archive, with two more that may be there: `space` ("normalised" or
    "unit") and `class_names`, as `speedk decode --format npz` writes them.

    Raises ArtifactError for a damaged archive, DataError for one that does not fit `real`.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            size = sum(info.file_size for info in archive.infolist())
            if size > _LIMIT:
                raise DataError(f"{path} holds {size:,} bytes, over the limit of {_LIMIT:,}")
            for name in ("images", "labels"):
                if name not in file.files:
                    raise DataError(f"{path} has no array {name!r}: it has {', '.join(file.files)[:200] or 'none'}")
            for name in {"images", "labels", "space", "class_names"} & set(file.files):
                _check_header(archive, name)
                found[name] = file[name]
    except _BROKEN as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path} does not exist") from None
        raise ArtifactError(f"{path} is damaged, or not a NumPy archive of plain arrays: {_said(error)}") from None
    _check_names(path, found.pop("class_names", None), real)
    space = str(found.pop("space", "unit"))
    if space not in ("normalised", "unit"):
        raise DataError(f"{path} says space={space[:40]!r}, neither 'normalised' nor 'unit'")
    tensors = {name: _tensor(path, name, array) for name, array in found.items()}
    return sources.arrays(path, tensors["images"], tensors["labels"], real, normalised=space == "normalised")


def parquet(path: Path, real: RealData) -> sources.Source:
    """The columns `image` (encoded) and `label` or `soft_label` (a list of probabilities) of a parquet file.

    Raises ArtifactError for a damaged file or image, DataError for one that does not fit `real`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from speedk.data.decode import Unreadable, open_image, to_array

    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        schema = pq.read_schema(path)
        label = next((name for name in ("soft_label", "label") if name in schema.names), None)
        if label is None or "image" not in schema.names:
            raise DataError(f"{path} has the columns {', '.join(schema.names)[:200]}: image and label are read")
        table = pq.read_table(path, columns=["image", label], partitioning=None)
        rows = table.column("image").to_pylist()
        labels = table.column(label).to_pylist()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ArtifactError(f"{path} is damaged, or not a parquet file: {_said(error)}") from None
    side, channels = real.geometry.resolution, real.geometry.channels
    images = np.empty((len(rows), channels, side, side), np.uint8)
    for row, value in enumerate(rows):
        content = value.get("bytes") if isinstance(value, dict) else value
        try:
            image = open_image(content if isinstance(content, bytes) else None)[0]
        except Unreadable as error:
            raise ArtifactError(f"the image in row {row} of {path} cannot be read: {error}") from None
        if image.size != (side, side):
            raise DataError(f"the image in row {row} of {path} is {image.width}x{image.height}, but {real.name} has "
                            f"{side}x{side}")
        images[row] = to_array(image.convert("L" if channels == 1 else "RGB"), side)
    try:
        array = np.asarray(labels)
    except ValueError:
        raise DataError(f"{path} holds labels of differing lengths") from None
    return sources.arrays(path, torch.from_numpy(images), _tensor(path, "labels", array), real)


def _check_header(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array that announces more than it has, before memory is taken for it."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    count = 1
    for side in shape:
        count *= side
    if min(shape, default=1) < 0 or count * dtype.itemsize > info.file_size:
        raise ValueError(f"{name} announces {list(shape)} values of {dtype}, more than it has")


def _check_names(path: Path, names: np.ndarray | None, real: RealData) -> None:
    if names is None:
        return
    said = [str(name) for name in np.atleast_1d(names)]
    if said != list(real.class_names):
        raise DataError(f"{path} has the classes {', '.join(said)[:80]}, but {real.name} has "
                        f"{', '.join(real.class_names)[:80]}: labels would not mean the same")


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "uif":
        raise DataError(f"{path} holds {name} of type {array.dtype}: numbers are read")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array))


def _said(error: Exception) -> str:
    return one_line(error) or type(error).__name__
