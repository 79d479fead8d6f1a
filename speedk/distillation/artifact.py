"""The distilled set as one file: what the budget counts, a header of JSON, and a checksum over both.

Reading runs no code that is in the file and believes nothing in it. The checksum finds damage; since a stranger can write a
right checksum too, every field, shape, dtype, name, value and index is checked on its own, the rebuilt set must
store exactly the tensors it was read from, and what decodes to a value that is not finite is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from speedk import registry
from speedk.distillation import parameterizations, tensorfile
from speedk.distillation.parameterizations.base import Parameterization, class_labels
from speedk.errors import ArtifactError, ConfigError, SpeedkError
from speedk.files import write_atomic
from speedk.geometry import Geometry

FORMAT = 1
LABELS = "labels"
MAX_RESOLUTION = 4096
MAX_DECODED = 1 << 33
"""Bytes of images that one call decodes at most: 8 GiB."""
_CHUNK = 8 << 20  # bytes of images decoded at a time; a method's working memory is some 30 times its images
_SPACES = ("normalised", "unit")
_GIVEN: dict[str, type | tuple[type, ...]] = {
    "recipe": dict, "class_names": list, "normaliser": dict, "data": dict, "seed": int, "protocol": str,
    "objective": dict, "chosen": str, "budget_off": bool,
}
_ADDED: dict[str, type | tuple[type, ...]] = {
    "format": int, "method": str, "spec": dict, "geometry": dict, "ipc": int, "images_per_class": list,
    "numbers": (int, float), "label_numbers": (int, float), "budget": int, "checksum": str,
}


def save(path: str | os.PathLike[str], synthetic: Parameterization, header: Mapping[str, Any]) -> None:
    """Write a finalized `synthetic` and its `header` as the file `path`, in one atomic step.

    `header` says where the set comes from: recipe, class_names, normaliser, data, seed, protocol, objective, chosen,
    budget_off. Added here: format, method, spec, geometry, ipc, images per class, counted numbers and budget, and
    the checksum. Equal content gives equal bytes. What is about to be written is first read back, so that no file is
    written that `load` refuses. Raises ArtifactError for content that cannot be stored, TrainingError where the system refuses.
    """
    write_atomic(path, dump(synthetic, header))


def dump(synthetic: Parameterization, header: Mapping[str, Any]) -> bytes:
    """The bytes that `save` writes."""
    tensors = synthetic.storage()
    counts = torch.bincount(synthetic.classes.cpu(), minlength=synthetic.geometry.classes).tolist()
    document = {
        **header,
        "format": FORMAT,
        "method": synthetic.name,
        "spec": dataclasses.asdict(synthetic.spec),
        "geometry": dataclasses.asdict(synthetic.geometry),
        "ipc": synthetic.ipc,
        "images_per_class": counts,
        "numbers": _numbers(tensors, learned_labels=False),
        "label_numbers": _numbers(tensors, learned_labels=True),
        "budget": synthetic.geometry.budget(synthetic.ipc),
    }
    document["checksum"] = checksum(document, tensors)
    data = tensorfile.pack(document, tensors)
    try:
        parse(data, "")
    except ArtifactError as error:
        raise ArtifactError(f"nothing was written, because it could not be read back: the file{error}") from error
    return data


def load(path: str | os.PathLike[str]) -> Distilled:
    """The distilled set in the file `path`. Raises ArtifactError, one line, for any file that `save` did not write."""
    return parse(tensorfile.read(path), os.fspath(path))


def parse(data: bytes, path: str) -> Distilled:
    """`load` from bytes; `path` is what errors call the file."""
    try:
        header, tensors = tensorfile.unpack(data)
        _check_format(header)
        if header.get("checksum") != checksum(header, tensors):
            raise ArtifactError("is damaged: its checksum is not that of its content")
        return Distilled(path, header, _rebuild(header, tensors))
    except SpeedkError as error:
        raise ArtifactError(f"{path} {error}") from error


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
        return (f"Distilled({self.path!r}: {self.method}, {len(self)} images of {g.channels}x{g.resolution}x{g.resolution} in "
                f"{g.classes} classes, {self.header['numbers']:,} numbers)")

    @property
    def classes(self) -> Tensor:
        """int64 [N]: the class each image stands for, class by class."""
        return self.synthetic.classes

    @property
    def labels(self) -> Tensor:
        """What to train on: int64 [N], the classes; or float32 [N, classes] where labels were learned."""
        return self._decode(torch.arange(len(self)), 1) if self.header["label_numbers"] else self.classes.clone()

    def images(self, space: str = "normalised", index: Tensor | None = None) -> Tensor:
        """Decode all images, or those of `index` (int64 [B]), a few megabytes at a time: float32 [N or B, C, H, W].

        space: "normalised", what networks train on; or "unit", pictures: brightness where 0 to 1 is what a display shows, and
        values beyond it are left as they are. Raises ArtifactError where the images take over 8 GiB or hold a value that is not finite, ValueError
        for an index that is out of range.
        """
        if space not in _SPACES:
            raise ValueError(f"space={space!r} is not one of {', '.join(_SPACES)}")
        index = torch.arange(len(self)) if index is None else torch.as_tensor(index, dtype=torch.int64)
        if index.ndim != 1 or index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"index must be [B] with values from 0 to {len(self) - 1}")
        size = 4 * self.geometry.pixels * index.numel()
        if size > MAX_DECODED:
            raise ArtifactError(f"{self.path} decodes to {size:,} bytes, over the limit of {MAX_DECODED:,} at once: decode it in "
                                "parts with images(index=...)")
        images = self._decode(index, 0)
        if not bool(torch.isfinite(images).all()):
            raise ArtifactError(f"{self.path} decodes to values that are not finite")
        return self._normaliser().unit(images) if space == "unit" else images

    def dataset(self, space: str = "normalised") -> TensorDataset:
        """Pairs (image, label) for a DataLoader, decoded once."""
        return TensorDataset(self.images(space), self.labels)

    def storage(self) -> list[tuple[str, float, int]]:
        """What is stored, by part: (name, float32-equivalents, bytes); "labels" is a part where labels were learned."""
        parts: dict[str, int] = {}
        for name, tensor in self.synthetic.storage().items():
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
        return [(part, _whole(size / 4), size) for part, size in parts.items()]

    @torch.no_grad()
    def _decode(self, index: Tensor, which: int) -> Tensor:
        step = max(1, _CHUNK // (4 * self.geometry.pixels))
        chunks = [self.synthetic.decode(part)[which] for part in index.split(step)] if index.numel() else []
        g = self.geometry
        return torch.cat(chunks) if chunks else torch.zeros(0, *((g.channels, g.resolution, g.resolution), (g.classes,))[which])

    def _normaliser(self) -> Any:
        from speedk import data

        return data.from_description(self.header["normaliser"])


def _check_format(header: Any) -> None:
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise ArtifactError("is damaged: its header does not say which format it is written in")
    if header["format"] != FORMAT:
        mend = "upgrade speedk" if header["format"] > FORMAT else "write it again with this version"
        raise ArtifactError(f"was written by format {header['format']}, this speedk reads {FORMAT}: {mend}")


def _rebuild(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parameterization:
    for key, kind in (_GIVEN | _ADDED).items():
        if key not in header:
            raise ArtifactError(f"has no {key!r} in its header")
        value = header[key]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise ArtifactError(f"has a {key!r} of the wrong type in its header")
    for key in ("data", "normaliser", "objective", "geometry"):
        _check_flat(key, header[key])
    if not isinstance(header["objective"].get("name"), str):
        raise ArtifactError("does not name its objective")
    geometry = _geometry(header["geometry"])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    labels = _images_per_class(header["images_per_class"], geometry, size)
    _check_names(header["class_names"], geometry)
    ipc = _between("ipc", header["ipc"], 1, 1 << 24)
    _between("seed", header["seed"], 0, 1 << 64)
    _check_counts(header, tensors, geometry.budget(ipc))
    if any(t.dtype.is_floating_point and not bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ArtifactError("holds a value that is not finite")
    try:
        plugin = registry.find(parameterizations, header["method"])
    except ConfigError as error:
        raise ArtifactError(f"was made by a method that this speedk does not have: {error}") from error
    spec = _spec(plugin.Spec, header["spec"], geometry)
    try:
        synthetic = plugin.from_storage(spec, geometry, ipc, labels, tensors)
    except (SpeedkError, ValueError) as error:
        raise ArtifactError(f"is not what it says it is: {error}") from error
    again = synthetic.storage()
    if again.keys() != tensors.keys() or any(
            (again[name].dtype, again[name].shape) != (t.dtype, t.shape)
            or tensorfile.tensor_bytes(again[name]) != tensorfile.tensor_bytes(t) for name, t in tensors.items()):
        raise ArtifactError(f"holds tensors that {header['method']} would not have stored")
    if not torch.equal(synthetic.classes.cpu(), class_labels(labels)):
        raise ArtifactError("does not hold the images per class that its header says")
    return synthetic


def _geometry(value: dict[str, Any]) -> Geometry:
    if set(value) != {"classes", "channels", "resolution"}:
        raise ArtifactError("has a geometry that is not classes, channels and resolution")
    _between("classes", value["classes"], 1, 1 << 20)
    if value["channels"] not in (1, 3):
        raise ArtifactError(f"has channels={value['channels']!r}, neither 1 nor 3")
    _between("channels", value["channels"], 1, 3)
    _between("resolution", value["resolution"], 1, MAX_RESOLUTION)
    return Geometry(**value)


def _images_per_class(counts: list[Any], geometry: Geometry, size: int) -> list[int]:
    """An image takes a stored byte at least, whatever the method: no list of counts can ask for more labels than that."""
    if len(counts) != geometry.classes:
        raise ArtifactError(f"counts images for {len(counts)} classes but has {geometry.classes}")
    for count in counts:
        _between("images_per_class", count, 1, size)
    if sum(counts) > size:
        raise ArtifactError(f"says {sum(counts):,} images but stores {size:,} bytes")
    return counts


def _check_names(names: list[Any], geometry: Geometry) -> None:
    if len(names) != geometry.classes:
        raise ArtifactError(f"has {len(names)} class names for {geometry.classes} classes")
    if not all(isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() for name in names):
        raise ArtifactError("has a class name that is empty, over 200 characters, or not printable text")
    if len(set(names)) < len(names):
        raise ArtifactError("has one name for two classes")


def _check_counts(header: dict[str, Any], tensors: Mapping[str, Tensor], budget: int) -> None:
    if header["budget"] != budget:
        raise ArtifactError(f"says a budget of {header['budget']} where its images per class allow {budget}")
    for key, learned in (("numbers", False), ("label_numbers", True)):
        counted = _numbers(tensors, learned_labels=learned)
        if header[key] != counted:
            raise ArtifactError(f"says {key}={header[key]} but stores {counted}")
    if header["numbers"] > budget and not header["budget_off"]:
        raise ArtifactError(f"stores {header['numbers']:,} numbers, over its budget of {budget:,}, and does not say so (budget=off)")


def _check_flat(key: str, value: Mapping[str, Any]) -> None:
    for name, entry in value.items():
        plain = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(item, (str, int, float, NoneType)) for item in plain):
            raise ArtifactError(f"has a {key} {name[:40]!r} that is neither a number, a text nor a list of them")


def _between(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ArtifactError(f"has {name}={str(value)[:40]}, not a whole number from {low} to {high:,}")
    return value


def _numbers(tensors: Mapping[str, Tensor], learned_labels: bool) -> int | float:
    """float32-equivalents: bytes / 4, of the learned labels or of everything else."""
    return _whole(sum(t.numel() * t.element_size() for n, t in tensors.items() if (n == LABELS) is learned_labels) / 4)


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _spec(kind: type, values: Mapping[str, Any], geometry: Geometry) -> Any:
    """The recipe fields as `kind`, a frozen dataclass of JSON types: exactly its fields, each of its type, in its range."""
    types = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    if wrong := sorted(fields ^ set(values)):
        state = "is missing" if wrong[0] in fields else "is unknown"
        raise ArtifactError(f"has a spec whose field {wrong[0][:40]!r} {state}")
    for name in fields:
        if not _fits(values[name], types[name]):
            raise ArtifactError(f"has a spec with {name}={str(values[name])[:40]!r}, which is of the wrong type or out of range")
    try:
        spec = kind(**{name: _tuples(value) for name, value in values.items()})
        if hasattr(spec, "check"):
            spec.check(geometry)
    except ValueError as error:  # ConfigError is one
        raise ArtifactError(f"has a spec that cannot be: {error}") from error
    return spec


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 31
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


__all__ = ["FORMAT", "Distilled", "checksum", "dump", "load", "parse", "save"]
