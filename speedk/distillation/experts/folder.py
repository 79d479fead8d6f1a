"""A folder of expert trajectories: one safetensors file an expert, the network's parameters after each epoch.

    experts.json              what all experts of the folder have in common (`Identity`)
    expert-0007.safetensors   theta [epochs + 1, P] float32 or bfloat16: the parameters in their named order, flattened,
                              at the start and after each epoch; `last` [P] float32 beside a bfloat16 theta, to go on
                              from; and a JSON header: the identity, number, and loss, accuracy and hash of each row

A file is written whole or not at all, and is mapped into memory when it is read: a row costs that row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from speedk import networks
from speedk.data import RealData
from speedk.distillation import tensorfile
from speedk.distillation.unroll.graph import alike
from speedk.errors import ArtifactError, ConfigError, TrainingError, one_line
from speedk.files import locked, unwritable, write_atomic
from speedk.geometry import Geometry
from speedk.precision import PRECISIONS
from speedk.text import counted

FORMAT = 1
IDENTITY_FILE = "experts.json"
_OF_DATA = ("classes", "channels", "resolution", "data", "normaliser")
_KINDS = {"str": (str,), "int": (int,), "bool": (bool,), "float": (float, int), "dict[str, Any]": (dict,)}
_FILE = re.compile(r"expert-(\d{4,})\.safetensors")


@dataclass(frozen=True)
class Identity:
    """All that an expert depends on but its number: experts of equal identity and number are equal.

    network: the student, trained by plain SGD at `rate` on batches of `batch`, with DSA if `augment`; standardise:
    every batch by its own mean and deviation, as the published code does. precision: of the stored rows, "float32" or
    "bf16". data: the fingerprint of the data set, which is called `dataset`; normaliser: its description.
    """

    network: str
    rate: float
    batch: int
    augment: bool
    standardise: bool
    seed: int
    precision: str
    data: str
    normaliser: dict[str, Any]
    classes: int
    channels: int
    resolution: int
    parameters: int
    dataset: str = dataclasses.field(compare=False)

    @classmethod
    def of(cls, real: RealData, *, network: str = "convnet", rate: float = 0.01, batch: int = 256, augment: bool = True,
           standardise: bool = False, seed: int = 0, precision: str = "float32") -> Identity:
        """The identity of experts on `real`. Raises ConfigError for values that cannot be."""
        if not 0 < rate < float("inf"):
            raise ConfigError(f"a rate of {rate} cannot train an expert: it must be above 0 and finite")
        if batch < 1:
            raise ConfigError(f"a batch of {batch} cannot train an expert: it must be at least 1")
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
        student = networks.fresh(network, real.geometry, 0)
        _check_buffers(network, student, real.geometry)
        return cls(network, rate, batch, augment, standardise, seed, precision, real.fingerprint,
                   real.normaliser.describe(), **dataclasses.asdict(real.geometry),
                   parameters=networks.parameter_count(student), dataset=real.name)

    @classmethod
    def read(cls, document: dict[str, Any]) -> Identity:
        """The identity that a file tells. Raises ValueError or TypeError where it is none."""
        identity = cls(**document)
        for field in dataclasses.fields(cls):
            value = getattr(identity, field.name)
            if type(value) not in _KINDS[str(field.type)]:
                raise ValueError(f"{field.name}={one_line(value, 40)} is not {field.type}")
        if identity.precision not in PRECISIONS:
            raise ValueError(f"precision={one_line(identity.precision, 40)} is not one of {', '.join(PRECISIONS)}")
        return identity

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.classes, self.channels, self.resolution)

    @property
    def key(self) -> str:
        """sha256 of all fields that count, hexadecimal."""
        return hashlib.sha256(tensorfile.canonical({n: getattr(self, n) for n in _compared()}).encode()).hexdigest()

    def difference(self, other: Identity, fields: Sequence[str] | None = None) -> str:
        """'rate=0.01, not 0.1' for the first of `fields` (None: all that count) where `other` differs, or ''."""
        for name in _compared() if fields is None else fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}={_short(mine)}, not {_short(theirs)}"
        return ""


def _compared() -> list[str]:
    return [f.name for f in dataclasses.fields(Identity) if f.compare]


@dataclass(frozen=True)
class Record:
    """What a file says of its expert: `losses` (mean of each epoch) and `accuracies` (0 to 1, on test images, at the
    start and after each epoch)."""

    number: int
    losses: list[float]
    accuracies: list[float]
    digests: list[str]

    @property
    def epochs(self) -> int:
        return len(self.losses)


class ExpertFolder:
    """The experts in `path`. Raises ArtifactError where a file is not what was written."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path, self.identity = path, identity

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ExpertFolder:
        """The folder `path`, which must be one. Raises ConfigError where it is not."""
        found = _read_identity(Path(path))
        if found is None:
            raise ConfigError(f"{path} is no folder of experts: it has no {IDENTITY_FILE}; make one with "
                              f"`speedk experts --out {path}`")
        return cls(Path(path), found)

    @classmethod
    def create(cls, path: str | os.PathLike[str], identity: Identity) -> ExpertFolder:
        """The folder `path` for experts of `identity`, made where there is none. Raises ConfigError where it holds
        others."""
        path = Path(path)
        found = _read_identity(path)
        if found is None:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(path, error) from None
            document = {"format": FORMAT, "identity": dataclasses.asdict(identity)}
            with locked(path / ".lock", wait=True):
                found = _read_identity(path)
                if found is None:
                    if other := next((entry.name for entry in path.iterdir() if not entry.name.startswith(".")), None):
                        raise ConfigError(f"{path} holds {one_line(other, 60)} but no {IDENTITY_FILE}: choose a folder "
                                          "that is new or empty")
                    write_atomic(path / IDENTITY_FILE, json.dumps(document, indent=1).encode() + b"\n")
                    found = identity
        cls(path, found).check_data(identity)  # before how they were trained, which matters less
        if wrong := found.difference(identity):
            raise ConfigError(f"{path} holds experts with {wrong}: choose another folder")
        return cls(path, identity)

    def check_data(self, wanted: Identity) -> None:
        """Raise ConfigError where `wanted` is for other data than these experts, or for the same in another form."""
        if wrong := self.identity.difference(wanted, _OF_DATA):
            dataset = one_line(self.identity.dataset, 60)
            raise ConfigError(f"{self.path} holds experts with {wrong}: they are for {dataset}, in that very form; "
                              "choose another folder")

    def file(self, number: int) -> Path:
        return self.path / f"expert-{number:04d}.safetensors"

    def numbers(self) -> list[int]:
        """The experts that have a file, in order."""
        found = (_FILE.fullmatch(name) for name in os.listdir(self.path))
        return sorted(int(match[1]) for match in found if match)

    def epochs(self, number: int) -> int:
        """Trained epochs of an expert; -1 where it has no file."""
        return self.record(number).epochs if self.file(number).exists() else -1

    def record(self, number: int) -> Record:
        with self._opened(number) as file:
            return self._record(number, file)

    def snapshot(self, number: int, epoch: int) -> Tensor:
        """The parameters [P] float32 of expert `number` after `epoch` epochs, checked against their hash."""
        with self._opened(number) as file:
            record = self._record(number, file)
            if not 0 <= epoch <= record.epochs:
                raise ConfigError(f"{self.file(number)} has {counted(record.epochs, 'epoch')}, not {epoch}: extend it "
                                  f"with `speedk experts --epochs {epoch}`")
            row = file.get_slice("theta")[epoch : epoch + 1][0]
            self._check(number, epoch, row, record)
            return row.to(torch.float32, copy=True)

    def last(self, number: int) -> tuple[Record, Tensor]:
        """The record, and the parameters [P] float32 to go on from."""
        record = self.record(number)
        if self.identity.precision == "float32":
            return record, self.snapshot(number, record.epochs)
        with self._opened(number) as file:
            row = file.get_tensor("last").clone()
        if _digest(row) != record.digests[-1]:
            raise self._damaged(number, "its last parameters are not the ones that were written")
        return record, row

    def rows(self, number: int) -> Tensor:
        """All of theta [epochs + 1, P], as stored, checked against their hashes: `write` makes these anew."""
        with self._opened(number) as file:
            record, rows = self._record(number, file), file.get_tensor("theta").clone()
            for epoch, row in enumerate(rows):
                self._check(number, epoch, row, record)
            return rows

    def write(self, number: int, rows: Tensor, last: Tensor, losses: list[float], accuracies: list[float]) -> None:
        """Store an expert's rows [epochs + 1, P] (of the folder's precision) and its `last` parameters (float32)."""
        tensors, digests = {"theta": rows}, [_digest(row) for row in rows]
        if self.identity.precision != "float32":
            tensors["last"] = last
            digests.append(_digest(last))
        header = {"format": FORMAT, "number": number, "identity": dataclasses.asdict(self.identity),
                  "losses": losses, "accuracies": accuracies, "digests": digests}
        write_atomic(self.file(number), save(tensors, {tensorfile.KEY: tensorfile.canonical(header)}))

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Whether `number` is this caller's to train while the context lasts. A process that dies gives up its own."""
        with locked(self.path / f".expert-{number:04d}.lock", wait=False) as mine:
            if mine:
                for left in self.path.glob(f".expert-{number:04d}.safetensors.*.partial"):
                    left.unlink(missing_ok=True)
            yield mine

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        try:
            with safe_open(self.file(number), framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise ArtifactError(f"{self.file(number)} is missing: train it again with `speedk experts`") from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, ConfigError):  # a ValueError too
                raise
            raise self._damaged(number, str(error)) from None

    def _record(self, number: int, file: Any) -> Record:
        header = tensorfile.parse((file.metadata() or {}).get(tensorfile.KEY, "").encode())
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if header.get("number") != number or Identity.read(header["identity"]) != self.identity:
            raise ValueError("it says it is another expert than its place says")
        record = Record(number, *(header.get(name) for name in ("losses", "accuracies", "digests")))
        shape, bf16 = file.get_slice("theta").get_shape(), self.identity.precision != "float32"
        told = ((record.losses, (float, int)), (record.accuracies, (float, int)), (record.digests, (str,)))
        if (not all(isinstance(part, list) and all(type(item) in kinds for item in part) for part, kinds in told)
                or shape != [record.epochs + 1, self.identity.parameters]
                or len(record.accuracies) != record.epochs + 1 or len(record.digests) != record.epochs + 1 + bf16):
            raise ValueError(f"its header and its {shape} numbers do not agree")
        return record

    def _check(self, number: int, epoch: int, row: Tensor, record: Record) -> None:
        if _digest(row) != record.digests[epoch]:
            raise self._damaged(number, f"the parameters of epoch {epoch} are not the ones that were written")

    def _damaged(self, number: int, why: str) -> ArtifactError:
        return ArtifactError(f"{self.file(number)} is damaged ({one_line(why, 120)}): delete it, and it will be "
                             "trained again")


def _check_buffers(name: str, student: nn.Module, geometry: Geometry) -> None:
    """Raise ConfigError unless all buffers of a fresh `student` are constants, the same for every expert: a file holds
    parameters alone. A training pass over two images of noise is tried."""
    before = {buffer: values.clone() for buffer, values in student.named_buffers()}
    if not before:
        return
    other = dict(networks.fresh(name, geometry, 1).named_buffers())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        student.train()(torch.randn(2, geometry.channels, geometry.resolution, geometry.resolution))
    after = dict(student.named_buffers())
    for buffer, values in before.items():
        if not alike(values, other[buffer]):
            raise ConfigError(f"{name} cannot be an expert: its {buffer} is drawn at random, and not kept, as it is no "
                              "parameter")
        if not alike(values, after[buffer]):
            raise ConfigError(f"{name} cannot be an expert: its {buffer} changes in training, untrained")


def _read_identity(path: Path) -> Identity | None:
    """What experts.json says, or None where there is none."""
    file = path / IDENTITY_FILE
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from None
    try:
        document = tensorfile.parse(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ArtifactError(f"is not of format {FORMAT}")
        return Identity.read(document["identity"])
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        why = one_line(str(error).removeprefix("is damaged: "), 120)
        raise ArtifactError(f"{file} is damaged ({why}): remove the folder, and its experts will be trained again"
                            ) from None


def _digest(row: Tensor) -> str:
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return one_line(value, 80)
