"""The network that coresets are chosen with: trained on the whole data set once, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from speedk import networks, seeds, training
from speedk.data import RealData, cache
from speedk.errors import SpeedkError, TrainingError
from speedk.files import write_atomic
from speedk.schedule import WHOLE
from speedk.text import no_bar
from speedk.workers import Pool


@dataclass(frozen=True)
class Trained:
    """network: after training, on the device; forgotten: int64 [M], of each training image (see `Members`)."""

    network: nn.Module
    forgotten: Tensor

    def features(self, real: RealData, rows: Tensor, pool: Pool) -> Tensor:
        """float32 [B, F]: what the classifier reads of the training images `rows`, int64 [B]."""
        self.network.eval()
        parts = [training.in_pieces(pool, _features, self.network, real.normalised("train", index))
                 for index in rows.split(WHOLE.batch)]
        return torch.cat([piece for part in parts for piece in part])


class Events:
    """Counts forgetting: an image is forgotten where the network, asked in a batch of training, is wrong about it and
    was right when it was last asked."""

    def __init__(self, count: int, device: torch.device | str = "cpu") -> None:
        self._count = torch.zeros(count, dtype=torch.int64, device=device)
        self._right = torch.zeros(count, dtype=torch.bool, device=device)

    def see(self, index: Tensor, right: Tensor) -> None:
        """The answers `right`, bool [B], to the images `index`, int64 [B], none of them twice."""
        self._count[index] += self._right[index] & ~right
        self._right[index] = right

    def forgotten(self) -> Tensor:
        """int64 [M]: how often each image was; never, where no answer was right."""
        return self._count.clone()


def trained(real: RealData, name: str, epochs: int, seed: int, pool: Pool,
            progress: bool | None = None) -> Trained:
    """The network `name` trained on all training images of `real`, from the cache where it has been before. progress:
    a bar; None shows it on a terminal.

    Raises TrainingError where the training is not finite.
    """
    network = networks.fresh(name, real.geometry, seeds.derive(seed, f"coreset {name}"), pool.device)
    networks.require_features(name, network)
    path = _path(real, name, epochs, seed, pool.device)
    known = ":" not in name  # a class of the user's own may be another one under the same name tomorrow
    if known and (found := _read(path, network, len(real.train))) is not None:
        return found
    data = training.ImageSet(lambda index: real.normalised("train", index), real.train.labels)
    events = Events(len(data), pool.device)
    generator = seeds.generator(seed, "coreset batches")
    with tqdm(total=epochs, desc=f"training the {name}", unit="epoch", leave=False, disable=no_bar(progress)) as bar:
        loss = training.train(network, data, replace(WHOLE, epochs=epochs), generator, pool, bar.update, events.see)
        if not math.isfinite(loss):
            raise TrainingError(f"the {name} for the features did not train: its loss is {loss} in epoch {bar.n}")
    result = Trained(network, events.forgotten())
    if known:
        _keep(path, result)
    return result


def _path(real: RealData, name: str, epochs: int, seed: int, device: torch.device) -> Path:
    key = json.dumps([2, real.fingerprint, real.normaliser.describe(), name, epochs, seed, device.type])
    return cache.folder() / "coresets" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path, network: nn.Module, count: int) -> Trained | None:
    """What the cache holds, loaded into `network`; None where it is not there or does not fit."""
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    forgotten, expected = tensors.pop("forgotten", None), network.state_dict()
    if forgotten is None or forgotten.dtype != torch.int64 or forgotten.shape != (count,):
        return None
    if tensors.keys() != expected.keys() or any(
            (t.shape, t.dtype) != (expected[k].shape, expected[k].dtype) for k, t in tensors.items()):
        return None
    network.load_state_dict(tensors)
    return Trained(network, forgotten)


def _keep(path: Path, result: Trained) -> None:
    """Store for the next time; a cache that cannot be written to is no error."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in result.network.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({**tensors, "forgotten": result.forgotten.cpu()}))
    except (OSError, SpeedkError):
        return


@torch.no_grad()
def _features(network: nn.Module, images: Tensor) -> Tensor:
    return network.features(images)
