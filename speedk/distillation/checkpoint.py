"""Checkpoints of a run: safetensors with a JSON header, written atomically, the newest two kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from speedk.distillation import tensorfile
from speedk.errors import TrainingError
from speedk.files import write_atomic

KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (nested dicts and lists of tensors and JSON values) as the checkpoint of `step`.

    Straight from the tensors' own memory, or from a GPU one tensor at a time: a state may be most of what there is.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    header = json.dumps({"step": step, "state": tree, "digest": _digest(tensors)}, sort_keys=True)
    path = folder / f"step-{step:08d}.safetensors"
    write_atomic(path, lambda stream: _write(stream, header, tensors))
    for old in _all(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def drop_newest(folder: Path) -> int:
    """Remove the newest checkpoint, if it is not the only one; the step of the newest that is left."""
    *older, newest = _all(folder)
    if older:
        newest.unlink()
    return int((older or [newest])[-1].stem.removeprefix("step-"))


def load_newest(folder: Path, device: torch.device) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, as (step, state), or None where there is none at all.

    Raises TrainingError where there are checkpoints and none can be read.
    """
    paths = _all(folder)
    problem = ""
    for path in reversed(paths):
        try:
            return _load(path, device)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            problem = problem or f"{path}: {error}"
    if paths:
        raise TrainingError(f"no checkpoint can be read ({problem}); start anew in another --out")
    return None


def _load(path: Path, device: torch.device) -> tuple[int, dict[str, Any]]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})[tensorfile.KEY])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    if header["digest"] != _digest(tensors):
        raise ValueError("its checksum does not match")
    return header["step"], _unflatten(header["state"], {name: t.to(device) for name, t in tensors.items()})


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _write(stream: BinaryIO, header: str, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file. Its library would have a copy of all of it in memory first."""
    start, order = tensorfile.head(header, tensors)
    stream.write(start)
    for name in order:
        stream.write(_bytes(tensors[name]))


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    """The values, where they lie if that is in the memory of the CPU."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data if tensor.numel() else b""


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # At least one dimension: a view as bytes is not defined without.
        tensors[name] = value.detach().reshape(value.shape or (1,))
        return {"tensor": name, "scalar": value.ndim == 0}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in tree:
        tensor = tensors[tree["tensor"]]
        return tensor.reshape(()) if tree["scalar"] else tensor
    if "dict" in tree:
        return {key: _unflatten(item, tensors) for key, item in tree["dict"]}
    if "list" in tree:
        return [_unflatten(item, tensors) for item in tree["list"]]
    return tree["value"]
