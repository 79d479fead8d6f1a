"""What a distilled file says of itself, and the checks that a header must pass: types, ranges, and sums that agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from speedk import data, registry
from speedk.distillation import parameterizations, recipe, tensorfile
from speedk.distillation.parameterizations.base import Parameterization, class_labels
from speedk.errors import ArtifactError, ConfigError, DataError, SpeedkError
from speedk.geometry import MAX_RESOLUTION, Geometry
from speedk.schedule import STANDARDISATIONS

FORMAT = 1
LABELS = "labels"
_GIVEN: dict[str, type | tuple[type, ...]] = {
    "recipe": dict, "class_names": list, "normaliser": dict, "data": dict, "seed": int, "protocol": str,
    "objective": dict, "chosen": str, "budget_off": bool,
}  # fmt: skip
_ADDED: dict[str, type | tuple[type, ...]] = {
    "format": int, "method": str, "spec": dict, "geometry": dict, "ipc": int, "images_per_class": list,
    "numbers": (int, float), "label_numbers": (int, float), "budget": int, "checksum": str,
}  # fmt: skip


def describe(synthetic: Parameterization, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a header that follow from the set itself (all but `checksum`)."""
    counts = torch.bincount(synthetic.classes.cpu(), minlength=synthetic.geometry.classes).tolist()
    return {
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


def check_format(header: Any) -> None:
    """Raise ArtifactError unless `header` says that it is of the format that is read here."""
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise ArtifactError("is damaged: its header does not say which format it is written in")
    if header["format"] != FORMAT:
        mend = "upgrade speedk" if header["format"] > FORMAT else "write it again with this version"
        raise ArtifactError(f"was written by format {header['format']}, this speedk reads {FORMAT}: {mend}")


def rebuild(header: dict[str, Any], tensors: dict[str, Tensor]) -> Parameterization:
    """The set that `header` and `tensors` hold, once everything in them is checked. Raises ArtifactError."""
    for key, kind in (_GIVEN | _ADDED).items():
        if key not in header:
            raise ArtifactError(f"has no {key!r} in its header")
        value = header[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ArtifactError(f"has a {key!r} of the wrong type in its header")
    for key in ("data", "normaliser", "objective", "geometry"):
        _check_flat(key, header[key])
    _check_making(header)
    geometry = _geometry(header["geometry"])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    _check_normaliser(header["normaliser"], geometry)
    labels = _images_per_class(header["images_per_class"], geometry, size)
    _check_names(header["class_names"], geometry)
    ipc = _between("ipc", header["ipc"], 1, 1 << 24)
    _between("seed", header["seed"], 0, recipe.MAX_SEED)
    _check_counts(header, tensors, geometry.budget(ipc))
    if any(t.dtype.is_floating_point and not bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ArtifactError("holds a value that is not finite")
    try:
        plugin = registry.find(parameterizations, header["method"])
    except ConfigError as error:
        raise ArtifactError(f"was made by a method that this speedk does not have: {error}") from error
    spec = _spec(plugin.Spec, header["spec"], geometry)
    try:
        with torch.random.fork_rng(devices=[]):  # modules draw starting values, which the caller must not notice
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


def _check_making(header: dict[str, Any]) -> None:
    """The fields that evaluation trusts: what was distilled, by what, and how it is to be trained on."""
    for key in ("name", "split", "note", "fingerprint"):
        if not isinstance(header["data"].get(key), str):
            raise ArtifactError(f"does not say the {key} of the data it was distilled from")
    if header["protocol"] not in STANDARDISATIONS:
        raise ArtifactError(f"has protocol={header['protocol'][:40]!r}, not one of {', '.join(STANDARDISATIONS)}")
    if not isinstance(header["objective"].get("name"), str):
        raise ArtifactError("does not name its objective")
    rate = header["objective"].get("lr", 1.0)
    if type(rate) not in (int, float) or not rate > 0:
        raise ArtifactError(f"has a learning rate of {str(rate)[:40]}, which is not a positive number")


def _geometry(value: dict[str, Any]) -> Geometry:
    if set(value) != {"classes", "channels", "resolution"}:
        raise ArtifactError("has a geometry that is not classes, channels and resolution")
    _between("classes", value["classes"], 1, 1 << 20)
    if value["channels"] not in (1, 3):
        raise ArtifactError(f"has channels={value['channels']!r}, neither 1 nor 3")
    _between("channels", value["channels"], 1, 3)
    _between("resolution", value["resolution"], 1, MAX_RESOLUTION)
    return Geometry(**value)


def _check_normaliser(description: Mapping[str, Any], geometry: Geometry) -> None:
    """Refuse one that is for images of another shape; a ZCA matrix is looked for only where pictures are asked for."""
    side = geometry.resolution
    if description.get("kind") == "zca":
        if description.get("shape") != [geometry.channels, side, side]:
            raise ArtifactError(f"is of {geometry.shape} but its normaliser is not")
        return
    try:
        data.from_description(description)
    except DataError as error:
        raise ArtifactError(f"is damaged: {error}") from error
    if len(description["mean"]) != geometry.channels:
        raise ArtifactError(f"has {geometry.channels} channels but a normaliser for {len(description['mean'])}")


def _images_per_class(counts: list[Any], geometry: Geometry, size: int) -> list[int]:
    """The counts, checked: an image takes a stored byte at least, so none can ask for more labels than the file has."""
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
    if not all(isinstance(name, str) and data.storable(name) for name in names):
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
        raise ArtifactError(f"stores {header['numbers']:,} numbers, over its budget of {budget:,}, and does not say "
                            "budget=off")


def _check_flat(key: str, value: Mapping[str, Any]) -> None:
    for name, entry in value.items():
        items = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(item, (str, int, float, NoneType)) for item in items):
            raise ArtifactError(f"has a {key} {name[:40]!r} that is neither a number, a text nor a list of them")


def _between(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ArtifactError(f"has {name}={str(value)[:40]}, not a whole number from {low} to {high:,}")
    return value


def _numbers(tensors: Mapping[str, Tensor], learned_labels: bool) -> int | float:
    """float32-equivalents: bytes / 4, of the learned labels or of everything else."""
    return whole(sum(t.numel() * t.element_size() for n, t in tensors.items() if (n == LABELS) is learned_labels) / 4)


def whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _spec(kind: type, values: Mapping[str, Any], geometry: Geometry) -> Any:
    """The recipe fields as the dataclass `kind`, each checked: name, type, range, and whether they go together."""
    try:
        spec = recipe.build(kind, dict(values), "its spec")
        if any(isinstance(value, int) and abs(value) >= 1 << 31 for value in values.values()):
            raise ArtifactError("has a spec with a number that is out of range")
        spec.check(geometry)
    except ValueError as error:  # ConfigError is one
        raise ArtifactError(f"has a spec that cannot be: {error}") from error
    return spec
