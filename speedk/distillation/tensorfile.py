"""A strict reader and writer of safetensors files that carry one JSON document.

The files are plain safetensors, which any reader of that format opens. Written here rather than by its library
because equal content must give equal bytes (the library's map of metadata has no fixed order), and because a file from
a stranger must be refused for whatever is not exactly so: its reader lets duplicate keys and unknown fields through.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedk.distillation import runfiles
from speedk.errors import ArtifactError

KEY = "speedk"
MAX_HEADER = 1 << 22
_MAX_DEPTH = 16
_MAX_NAME = 200
_DTYPES = {"F32": np.dtype("<f4"), "U8": np.dtype("u1"), "U16": np.dtype("<u2")}
_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.uint16: "U16"}  # of artifacts
_OTHER_NAMES = {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
                torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"}  # fmt: skip
_ALIGN = 8


def pack(document: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file with `document` (JSON types) and `tensors` (float32, uint8, uint16), in a fixed order."""
    blobs = {name: tensor_bytes(tensor) for name, tensor in tensors.items()}
    start, order = head(canonical(document), tensors)
    if len(start) - 8 > MAX_HEADER:
        raise ArtifactError(f"the header takes {len(start) - 8:,} bytes, more than {MAX_HEADER:,}")
    return b"".join([start, *(blobs[name] for name in order)])


def head(text: str, tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The bytes of a file before its first tensor's, with `text` as its document, and the order of the tensors."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide first: all stay aligned
    names, end = _NAMES | _OTHER_NAMES, 0
    outer: dict[str, Any] = {"__metadata__": {KEY: text}}
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        outer[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                       "data_offsets": [begin, end]}  # fmt: skip
    header = json.dumps(outer, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGN)
    return struct.pack("<Q", len(header)) + header, order


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the regular file `path`. Raises ArtifactError where there is none or it cannot be read."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            inside = Path(path, runfiles.DISTILLED)
            hint = f": did you mean {inside}?" if inside.is_file() else f" and holds no {runfiles.DISTILLED}"
            raise ArtifactError(f"{os.fspath(path)} is a folder{hint}")
        if not stat.S_ISREG(mode):
            raise ArtifactError(f"{os.fspath(path)} is not a regular file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{os.fspath(path)} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot read {os.fspath(path)!r}: {reason}") from error


def unpack(data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """The document and the tensors of `pack`. Raises ArtifactError (without the file's name) for anything else."""
    other = looks_like(data)
    if other:
        raise ArtifactError(f"is {other}, not a file that speedk wrote")
    if len(data) < 8:
        raise ArtifactError(f"is cut off: it has {len(data)} bytes" if data else "is empty")
    (size,) = struct.unpack("<Q", data[:8])
    if not 2 <= size <= MAX_HEADER or data[8:9] != b"{":
        raise ArtifactError("is not a file that speedk wrote, or its first bytes are damaged")
    if 8 + size > len(data):
        raise ArtifactError(f"is cut off: it has {len(data):,} bytes and its header alone takes {8 + size:,}")
    outer = parse(data[8:8 + size])
    metadata = outer.pop("__metadata__", {}) if isinstance(outer, dict) else {}
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise ArtifactError("is a safetensors file, but not one that speedk wrote")
    if len(metadata) > 1:
        raise ArtifactError("is damaged: its metadata holds more than speedk writes")
    return parse(metadata[KEY].encode("utf-8", "surrogatepass")), _tensors(outer, memoryview(data)[8 + size:])


def _tensors(table: dict[str, Any], data: memoryview) -> dict[str, Tensor]:
    """Read each tensor of `table`; together they must cover `data` from its first byte to its last."""
    rows = []
    for name, entry in table.items():
        if not (0 < len(name) <= _MAX_NAME and name.isascii() and name.isprintable()):
            raise ArtifactError(f"is damaged: {name[:40]!r} is no name of a tensor")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ArtifactError(f"is damaged: the entry of tensor {name!r} is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ArtifactError(f"is damaged: tensor {name!r} has dtype {str(dtype)[:40]!r}, not one of "
                                f"{', '.join(_DTYPES)}")
        if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
            raise ArtifactError(f"is damaged: the shape or offsets of tensor {name!r} are not natural numbers")
        if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ArtifactError(f"is damaged: tensor {name!r} says shape {shape} of {dtype} but has "
                                f"{offsets[1] - offsets[0]} bytes")
        rows.append((*offsets, name, _DTYPES[dtype], shape))
    end, tensors = 0, {}
    for start, stop, name, dtype, shape in sorted(rows, key=lambda row: row[:3]):
        if start != end:
            raise ArtifactError(f"is damaged: tensor {name!r} does not begin where the one before it ends")
        if stop > len(data):
            raise ArtifactError(f"is cut off: {len(data):,} bytes of tensors, but {name!r} ends at byte {stop:,}")
        values = np.frombuffer(data[start:stop], dtype).reshape(shape)
        tensors[name] = torch.from_numpy(values.astype(dtype.newbyteorder("="), copy=True))
        end = stop
    if end != len(data):
        raise ArtifactError(f"has {len(data) - end:,} bytes too many at its end")
    return tensors


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def dtype_name(tensor: Tensor) -> str:
    """The format's name of a tensor's dtype. Raises ArtifactError for one that no part of an artifact has."""
    if tensor.dtype not in _NAMES:
        raise ArtifactError(f"a tensor of {tensor.dtype} cannot be stored: float32, uint8 or uint16")
    return _NAMES[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values in C order, little-endian."""
    values = tensor.detach().cpu().contiguous().numpy()
    return values.astype(_DTYPES[dtype_name(tensor)], copy=False).tobytes()


def canonical(document: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, ASCII, finite numbers."""
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the header is not JSON: {error}") from error


def parse(text: bytes) -> Any:
    """Strict JSON: no duplicate keys, no NaN or infinity, no giant numbers, no deep nesting, no broken UTF-8."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_number,
                              parse_float=_number, parse_int=_number)
    except RecursionError:
        raise ArtifactError("is damaged: its header is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ArtifactError(f"is damaged: its header is not JSON ({str(error)[:120]})") from None
    _check_depth(document)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _number(digits: str) -> int | float:
    if len(digits) > 40:
        raise ValueError("a number has over 40 digits")
    if digits.lstrip("-").isdigit():
        return int(digits)
    value = float(digits)  # "NaN", "Infinity" and "1e999" come here too
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not a finite number")
    return value


def _check_depth(document: Any) -> None:
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ArtifactError(f"is damaged: its header is nested more than {_MAX_DEPTH} deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise ArtifactError("is damaged: its header holds half a character (a lone surrogate)")
        level = inner


_OTHERS = (
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"PAR1", "a parquet file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"{", "a JSON file"),
)


def looks_like(data: bytes) -> str | None:
    """What a file of another format is, by its first bytes; nothing of it is ever decoded."""
    if data[:4] == b"PK\x03\x04":
        names = data[:1 << 16] + data[-(1 << 16):]  # a zip names its members at its end; the first is also at its start
        if b"data.pkl" in names:
            return "a PyTorch checkpoint (a pickle in a zip)"
        return "a NumPy archive (.npz)" if b".npy" in names else "a zip archive"
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and data[8:9] != b"{":
        return "a Python pickle"
    return next((what for magic, what in _OTHERS if data.startswith(magic) and data[8:9] != b"{"), None)
