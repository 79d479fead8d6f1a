"""The distilled set as one file: what the budget counts, a header of JSON, and a checksum over both.

Reading runs no code that is in the file and believes nothing in it. The checksum finds damage; since a stranger can
write a right checksum too, every field, shape, dtype, name, value and index is checked on its own, the rebuilt set
must store exactly the tensors it was read from, and what decodes to a value that is not finite is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from speedk import data
from speedk import ops as ops  # before any file is read: what SPEEDK_BACKEND says wrongly is not the file's fault
from speedk.distillation import tensorfile
from speedk.distillation.header import check_format, describe, rebuild, whole
from speedk.distillation.parameterizations.base import Parameterization
from speedk.errors import ArtifactError, SpeedkError, one_line
from speedk.files import write_atomic

MAX_DECODED = 1 << 33
"""Bytes of images that one call decodes at most: 8 GiB."""
_CHUNK = 8 << 20  # bytes of images decoded at a time; a method's working memory is some 30 times its images
_SPACES = ("normalised", "unit")


def save(path: str | os.PathLike[str], synthetic: Parameterization, header: Mapping[str, Any]) -> None:
    """Write a finalized `synthetic` and its `header` as the file `path`, in one atomic step.

    `header` says where the set comes from: recipe, class_names, normaliser, data, seed, protocol, objective, chosen,
    budget_off. Added here: format, method, spec, geometry, ipc, images per class, counted numbers and budget, and
    the checksum. Equal content gives equal bytes. What is about to be written is first read back, so that no file is
    written that `load` refuses. Raises ArtifactError for content that cannot be stored, TrainingError where the
    system refuses to write.
    """
    write_atomic(path, dump(synthetic, header))


def dump(synthetic: Parameterization, header: Mapping[str, Any]) -> bytes:
    """The bytes that `save` writes."""
    tensors = synthetic.storage()
    document = {**header, **describe(synthetic, tensors)}
    document["checksum"] = checksum(document, tensors)
    packed = tensorfile.pack(document, tensors)
    try:
        parse(packed, "")
    except ArtifactError as error:
        raise ArtifactError(f"nothing was written, because it could not be read back: the file{error}") from error
    return packed


def load(path: str | os.PathLike[str]) -> Distilled:
    """The distilled set in the file `path`. Raises ArtifactError, one line, for any file that `save` did not write."""
    return parse(tensorfile.read(path), os.fspath(path))


def parse(packed: bytes, path: str) -> Distilled:
    """`load` from bytes; `path` is what errors call the file."""
    try:
        header, tensors = tensorfile.unpack(packed)
        check_format(header)
        if header.get("checksum") != checksum(header, tensors):
            raise ArtifactError("is damaged: its checksum is not that of its content")
        return Distilled(path, header, rebuild(header, tensors))
    except SpeedkError as error:
        raise ArtifactError(f"{path} {one_line(error, 400)}") from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the header (but for its checksum) and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    table = {name: [tensorfile.dtype_name(t), list(t.shape)] for name, t in tensors.items()}
    rest = {key: value for key, value in header.items() if key != "checksum"}
    digest.update(tensorfile.canonical([rest, table]).encode())
    for name in sorted(tensors):
        digest.update(tensorfile.tensor_bytes(tensors[name]))
    return digest.hexdigest()


class Distilled:
    """A distilled set read from its file.

    path: the file; header: everything it says about itself (JSON types); method, geometry, ipc, class_names, seed as
    there; fingerprint: its checksum, which two files share only if they hold the same; synthetic: the set itself,
    a Parameterization that is not trained any more.
    """

    def __init__(self, path: str, header: dict[str, Any], synthetic: Parameterization) -> None:
        self.path, self.header = path, header
        self.synthetic = synthetic.eval().requires_grad_(False)
        self.method: str = header["method"]
        self.geometry, self.ipc = synthetic.geometry, synthetic.ipc
        self.class_names: list[str] = list(header["class_names"])
        self.fingerprint: str = header["checksum"]

    def __len__(self) -> int:
        return self.synthetic.size

    def __repr__(self) -> str:
        g = self.geometry
        return (f"Distilled({self.path!r}: {self.method}, {len(self)} images of {g.shape} in {g.classes} classes, "
                f"{self.header['numbers']:,} numbers)")

    @property
    def classes(self) -> Tensor:
        """int64 [N]: the class each image stands for, class by class."""
        return self.synthetic.classes

    @property
    def labels(self) -> Tensor:
        """What to train on: int64 [N], the classes; or float32 [N, classes] where labels were learned."""
        if not self.header["label_numbers"]:
            return self.classes.clone()
        return torch.cat([self._decode(part)[1] for part in self._chunks(torch.arange(len(self)))])

    def images(self, space: str = "normalised", index: Tensor | None = None) -> Tensor:
        """Decode all images, or those of `index` (int64 [B]), a few megabytes at a time: float32 [N or B, C, H, W].

        space: "normalised", what networks train on; or "unit", pictures, clipped to 0 to 1. Raises ArtifactError where
        the images take over 8 GiB or hold a value that is not finite, DataError where pictures need a ZCA inverse that
        is not at hand, ValueError for an index that is out of range.
        """
        if space not in _SPACES:
            raise ValueError(f"space={space!r} is not one of {', '.join(_SPACES)}")
        index = torch.arange(len(self)) if index is None else index.cpu()
        if index.dtype != torch.int64 or index.ndim != 1 or (
                index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self)):
            raise ValueError(f"index must be int64 [B] with values from 0 to {len(self) - 1}")
        g = self.geometry
        size = 4 * g.pixels * index.numel()
        if size > MAX_DECODED:
            raise ArtifactError(f"{self.path} decodes to {size:,} bytes, over the limit of {MAX_DECODED:,} at once: "
                                "decode it in parts with images(index=...)")
        normaliser = data.from_description(self.header["normaliser"]) if space == "unit" else None
        images = torch.empty(index.numel(), g.channels, g.resolution, g.resolution)
        for part, target in zip(self._chunks(index), self._chunks(images), strict=True):
            decoded = self._decode(part)[0]
            if not bool(torch.isfinite(decoded).all()):
                raise ArtifactError(f"{self.path} decodes to values that are not finite")
            target.copy_(decoded if normaliser is None else normaliser.unit(decoded))
        return images

    def dataset(self, space: str = "normalised") -> TensorDataset:
        """Pairs (image, label) for a DataLoader, decoded once."""
        return TensorDataset(self.images(space), self.labels)

    def storage(self) -> list[tuple[str, float, int]]:
        """What is stored, by part: (name, float32-equivalents, bytes); "labels" is a part where labels were learned."""
        parts: dict[str, int] = {}
        for name, tensor in self.synthetic.storage().items():
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
        return [(part, whole(size / 4), size) for part, size in parts.items()]

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, _CHUNK // (4 * self.geometry.pixels)))

    @torch.no_grad()
    def _decode(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.synthetic.decode(index)


__all__ = ["Distilled", "checksum", "dump", "load", "parse", "save"]
