"""From a source to a report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speedk import networks, training
from speedk.errors import ConfigError, DataError
from speedk.evaluation import read, robustness, sources, train
from speedk.evaluation.report import NetworkResult, Report
from speedk.files import write_atomic
from speedk.networks import given
from speedk.schedule import Schedule, schedule
from speedk.text import no_bar
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.artifact import Distilled

FOREIGN = {".npz": read.npz, ".parquet": read.parquet}
"""Files of other code bases, by suffix."""


def evaluate(source: str | os.PathLike[str] | Distilled | sources.Source, real: RealData | None = None, *,
             networks: Sequence[str] = ("convnet",), runs: int = 5, protocol: str = "paper", seed: int = 0,
             standardisation: str | None = None, rate: float | None = None, epochs: int | None = None,
             precision: str = "float32", device: torch.device | str = "auto", other_data: bool = False,
             out: str | os.PathLike[str] | None = None, corruptions: bool | str | os.PathLike[str] = False,
             threads: int | None = None, progress: bool | None = None) -> Report:
    """Train fresh networks on the images of `source` and test each once, after its last epoch.

    source: the path of a distilled file, or of images and labels (.npz, .parquet); or what `speedk.load` gives; or a
    `Source` (`sources.whole`, `sources.real_images`). real: the data it is tested on; None loads, by name, the data
    that a distilled file says it comes from. networks: by their names, or as "my.module:Net". runs: networks of each
    kind, five by default; run r has the seed `seed + r` for everything random in it.
    protocol: "paper", the published one, or "quick", of fewer epochs (`speedk.schedule`). standardisation: "mtt" or
    "speed"; None is the file's own, else "mtt". rate: None is the one learned with the file, else 0.01. epochs: None is
    the protocol's. precision: of the networks' convolutions and matrix products, "float32" or "bf16". device: "auto", a
    GPU where there is one, or what PyTorch calls it. other_data: a distilled file may be tested on data it was not
    distilled from. out: write the report there as JSON. corruptions: test on corrupted test images too, made here
    (True) or read from a folder like CIFAR-10-C (its path). threads: of the CPU; they do not change the numbers, but
    for networks with dropout. progress: a bar; None shows it on a terminal.

    A run whose loss is not finite is reported as failed, and its network has no mean. Raises ConfigError for options
    that do not exist, ArtifactError for a damaged file, DataError for data that do not fit it.
    """
    started = time.monotonic()
    if runs < 1 or not networks:
        raise ConfigError(f"there is nothing to run: runs={runs}, networks={list(networks)}")
    for name in networks:
        given(name)
    source, real = resolve(source, real, other_data, progress is not False)
    standardisation = standardisation or source.standardisation or "mtt"
    plan = schedule(protocol, standardisation, source.whole, rate if rate is not None else source.rate, epochs,
                    precision)
    device = device_of(device)
    real = real.to(device)
    variants = None
    if corruptions is not False:
        variants = robustness.made(real) if corruptions is True else robustness.read(Path(corruptions), real)
    trained, corrupted = _train_and_test(source, real, list(dict.fromkeys(networks)), range(seed, seed + runs), plan,
                                         device, threads, progress, variants)
    name = ("whole" if source.whole else protocol) + (" (changed)" if (rate, epochs) != (None, None) else "")
    report = Report(
        source=source.title, images=source.size, storage=source.storage, data=real.describe(),
        protocol={"name": name, "standardisation": standardisation, "schedule": str(plan), "epochs": plan.epochs,
                  "rate": plan.rate, "batch": plan.batch, "precision": plan.precision},
        seed=seed, device=device_name(device), seconds=time.monotonic() - started, results=_results(trained),
        details=source.details, corrupted_by=variants.source if variants is not None else "",
        robustness=_robustness(trained, corrupted) if corrupted is not None else [])
    if out is not None:
        write_atomic(out, report.to_json().encode())
    return report


def resolve(source: Any, real: RealData | None, other_data: bool, progress: bool) -> tuple[sources.Source, RealData]:
    """The source that `evaluate` was given, and the data that it is tested on."""
    from speedk.distillation import artifact

    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        reader = FOREIGN.get(path.suffix.lower())
        if reader is not None:
            if real is None:
                raise DataError(f"{path} does not say what to test on: give the data (--dataset or --data)")
            return reader(path, real), real
        source = artifact.load(path)
    if isinstance(source, artifact.Distilled):
        return sources.distilled(source, real or load_data(source.header, progress=progress), other_data)
    if real is None:
        raise DataError("give the data to test on")
    return source, real


def load_data(header: dict[str, Any], folder: Path | None = None, progress: bool = True) -> RealData:
    """The data that an artifact's header says it was distilled from: by name, or from `folder`."""
    from speedk import data

    said, normaliser = header["data"], header["normaliser"].get("kind")
    name = said.get("name") if said.get("name") in data.names() else None
    if name is None and folder is None:
        raise DataError(f"the file was distilled from {str(said.get('name'))!r}, which no data set is named: give its "
                        "folder with --data")
    split = said.get("split") if name is not None and said.get("split") in ("ilsvrc", "fastai") else None
    return data.load(name, folder, resolution=header["geometry"]["resolution"], split=split, normaliser=normaliser,
                     progress=progress)


def _train_and_test(source: sources.Source, real: RealData, names: list[str], seeds: range, plan: Schedule,
                    device: torch.device, threads: int | None, progress: bool | None,
                    variants: robustness.Variants | None
                    ) -> tuple[list[train.Run], dict[str, list[list[float]]] | None]:
    sets = {seed: source.images(seed, real, device) for seed in seeds}
    test = training.ImageSet(lambda index: real.normalised("test", index), real.test.labels)
    hidden = no_bar(progress)
    with Pool(device, threads) as pool:
        with tqdm(total=len(names) * len(seeds) * plan.epochs, desc="training", unit="epoch", disable=hidden,
                  leave=False) as bar:
            trained = train.train_all(names, sets, real.geometry, plan, pool, bar.update)
        finished = [run for run in trained if run.failure is None]
        nets = [run.network for run in finished]
        with tqdm(total=math.ceil(len(test) / plan.batch), desc="testing", unit="batch", disable=hidden,
                  leave=False) as bar:
            found = training.accuracies(nets, test, pool, batch=plan.batch, standardise=plan.standardise,
                                        precision=plan.precision, on_batch=bar.update)
        corrupted = None
        if variants is not None:
            with tqdm(total=robustness.VARIANTS, desc="testing on corrupted images", unit="variant", disable=hidden,
                      leave=False) as bar:
                corrupted = robustness.measure(nets, variants, real, pool, batch=plan.batch,
                                               standardise=plan.standardise, precision=plan.precision,
                                               on_variant=bar.update)
    for run, accuracy in zip(finished, found, strict=True):
        run.accuracy = accuracy
    return trained, corrupted


def _results(trained: list[train.Run]) -> list[NetworkResult]:
    results = []
    for name in dict.fromkeys(run.network_name for run in trained):
        own = [run for run in trained if run.network_name == name]
        results.append(NetworkResult(
            name, networks.parameter_count(own[0].network), [run.seed for run in own],
            [None if run.accuracy is None else round(100 * run.accuracy, 6) for run in own],
            {run.seed: run.failure for run in own if run.failure is not None}))
    return results


def _robustness(trained: list[train.Run], corrupted: dict[str, list[list[float]]]) -> list[robustness.Robustness]:
    finished = [run for run in trained if run.failure is None]
    results = []
    for name in dict.fromkeys(run.network_name for run in trained):
        places = [i for i, run in enumerate(finished) if run.network_name == name]
        each = {kind: [[accuracies[i] for i in places] for accuracies in severities]
                for kind, severities in corrupted.items()}
        clean = [round(100 * finished[i].accuracy, 6) for i in places]
        failed = any(run.failure is not None for run in trained if run.network_name == name)
        results.append(robustness.Robustness(name, clean, each, failed))
    return results


def device_of(device: torch.device | str) -> torch.device:
    """The device that `device` says, or the one that "auto" finds."""
    from speedk.distillation.plan import chosen_device

    return chosen_device("auto") if device == "auto" else torch.device(device)


def device_name(device: torch.device) -> str:
    """The device as a report names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
