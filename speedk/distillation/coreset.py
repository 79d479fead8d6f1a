"""From real data to a coreset in a file: choose real images, and store them as plain synthetic ones are stored."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from tqdm import tqdm

from speedk import networks, registry, seeds
from speedk.data import RealData
from speedk.distillation import artifact, coreset_network, coresets
from speedk.distillation.coresets.base import Coreset, Members
from speedk.distillation.parameterizations.pixels import Pixels, Spec
from speedk.errors import ConfigError
from speedk.schedule import WHOLE
from speedk.text import no_bar
from speedk.workers import Pool


def choose(real: RealData, method: str, ipc: int, *, seed: int = 0, network: str = "convnet",
           epochs: int = WHOLE.epochs, device: torch.device | str = "cpu", threads: int | None = None,
           progress: bool | None = None) -> Tensor:
    """int64 [classes * ipc]: rows of the training part of `real`, `ipc` of each class, class by class.

    method: a file of `speedk.distillation.coresets`. Where it looks at features or at what is forgotten, `network` is
    first trained on the whole data set for `epochs` (or taken from the cache). progress: bars; None shows them on a
    terminal. Raises ConfigError for another method, or more images than the smallest class has.
    """
    plugin: type[Coreset] = registry.find(coresets, method)
    if ipc < 1 or epochs < 1:
        raise ConfigError(f"nothing can be chosen: ipc={ipc}, epochs={epochs}")
    labels, counts = real.train.labels.cpu(), class_sizes(real, ipc)
    networks.given(network)
    pool = Pool(torch.device(device), threads)
    real = real.to(pool.device)
    chosen = []
    with pool:
        seen = coreset_network.trained(real, network, epochs, seed, pool, progress) if plugin.looks_at else None
        for label, rows in enumerate(tqdm(torch.argsort(labels, stable=True).split(counts.tolist()), desc="choosing",
                                          unit="class", delay=2, leave=False, disable=no_bar(progress))):
            members = Members(len(rows))
            if plugin.looks_at == "features":
                members = Members(len(rows), features=seen.features(real, rows, pool))
            elif plugin.looks_at == "forgotten":
                members = Members(len(rows), forgotten=seen.forgotten.cpu()[rows])
            chosen.append(rows[plugin.choose(members, ipc, seeds.generator(seed, f"coreset {method}", label)).cpu()])
    return torch.cat(chosen)


def class_sizes(real: RealData, ipc: int) -> Tensor:
    """int64 [classes]: training images of each class. Raises ConfigError where one has fewer than `ipc`."""
    counts = torch.bincount(real.train.labels.cpu(), minlength=real.geometry.classes)
    if int(counts.min()) < ipc:
        name = real.class_names[int(counts.argmin())]
        raise ConfigError(f"class {name!r} has {int(counts.min())} training images, fewer than ipc={ipc}: lower ipc")
    return counts


def save(path: str | os.PathLike[str], real: RealData, rows: Tensor, method: str, *, seed: int = 0,
         network: str = "convnet", epochs: int = WHOLE.epochs) -> None:
    """Write the training images `rows` (of `choose`) as a file that `speedk.load` reads: the storage of plain pixels,
    with the method in the place of the objective, and the rows themselves."""
    g = real.geometry
    plugin: type[Coreset] = registry.find(coresets, method)
    with_network = {"network": network, "epochs": epochs} if plugin.looks_at else {}
    synthetic = Pixels(Spec(init="real"), g, len(rows) // g.classes, images=real.normalised("train", rows).cpu())
    ours = {"name": f"coreset {method}", "row": "ours", "published": ""}
    trained = f", by a {network} trained for {epochs} epochs on the whole data set" if plugin.looks_at else ""
    artifact.save(path, synthetic, {
        "recipe": {"recipe": ours, "coreset": {"method": method, **with_network, "rows": rows.tolist()}},
        "class_names": list(real.class_names), "normaliser": real.normaliser.describe(), "data": real.describe(),
        "seed": seed, "protocol": "mtt", "objective": {"name": method, **with_network},
        "chosen": f"a coreset: {plugin.says}{trained}; nothing in it was learned", "budget_off": False})
