"""Continual learning: classes arrive in steps, and after each a fresh network learns all that came so far.

The protocol of Figure 2 of the paper, GDumb's (Prabhu et al. 2020) as distribution matching used it: a memory of a few
stored images' worth per class, no network kept from one step to the next, and a test on every class seen so far.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speedk import seeds, training
from speedk.errors import ConfigError, DataError
from speedk.evaluation import sources, stepfiles, train
from speedk.evaluation.evaluate import device_name, device_of, resolve
from speedk.networks import given as allowed
from speedk.schedule import Schedule, schedule
from speedk.text import no_bar
from speedk.training import ImageSet
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.artifact import Distilled

STEPS = 5


@dataclass(frozen=True)
class Curve:
    """One source learned by one kind of network. accuracies: per cent of the test images of all classes seen, for each
    step, one a run, None where the run failed; failures: in words."""

    source: str
    network: str
    accuracies: list[list[float | None]]
    failures: list[str]

    def mean(self, step: int) -> float | None:
        runs = self.accuracies[step]
        return None if None in runs else statistics.fmean(runs)

    def std(self, step: int) -> float | None:
        """The population standard deviation over runs, each of which has its own split of the classes."""
        runs = self.accuracies[step]
        return None if None in runs else statistics.pstdev(runs)


@dataclass(frozen=True)
class ContinualReport:
    """classes: seen after each step; memories: what was learned from, with how its classes were split and how it was
    trained on, in words; curves: of each memory by each network."""

    classes: list[int]
    memories: list[dict[str, Any]]
    curves: list[Curve]
    data: dict[str, Any]
    seeds: list[int]
    device: str
    seconds: float

    @property
    def failed(self) -> bool:
        return any(curve.failures for curve in self.curves)

    def to_dict(self) -> dict[str, Any]:
        curves = [{"source": c.source, "network": c.network, "means": [c.mean(i) for i in range(len(self.classes))],
                   "stds": [c.std(i) for i in range(len(self.classes))], "accuracies": c.accuracies,
                   "failures": c.failures} for c in self.curves]
        return {"classes": self.classes, "memories": self.memories, "curves": curves, "data": self.data,
                "seeds": self.seeds, "device": self.device, "seconds": round(self.seconds, 1)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def continual(given: Sequence[str | os.PathLike[str] | Distilled | sources.Source], real: RealData | None = None, *,
              steps: int | None = None, networks: Sequence[str] = ("convnet",), runs: int = 5, protocol: str = "paper",
              seed: int = 0, standardisation: str | None = None, rate: float | None = None, epochs: int | None = None,
              precision: str = "float32", device: torch.device | str = "auto", other_data: bool = False,
              threads: int | None = None, progress: bool | None = None) -> ContinualReport:
    """Learn the classes of each of `given` in `steps` and test on all seen after each.

    given: what `evaluate` takes, each a memory of all classes, of which a step sees its part: run r splits them at
    random by the seed `seed + r`, alike for all of `given`. Or a folder with a distilled file for each step, in the
    order of their names, each of some classes of `real` by their names; its classes then come in that order in every
    run. Note that a method which was distilled on all classes at once may share something between them (SPEED its
    dictionary and its network), which the first step then knows already. steps: default 5, or as many as a folder has
    files. The other arguments are those of `evaluate`. Raises what `evaluate` raises.
    """
    started = time.monotonic()
    if runs < 1 or not networks or not given:
        raise ConfigError(f"there is nothing to run: runs={runs}, networks={list(networks)}, {len(given)} files")
    for name in networks:
        allowed(name)
    device, names = device_of(device), list(dict.fromkeys(networks))
    made: list[_Memory] = []
    for one in given:
        if isinstance(one, (str, os.PathLike)) and Path(one).is_dir():
            if real is None:
                raise DataError(f"{one} holds a file for each step: say which data they are parts of")
            source, parts = stepfiles.read(Path(one), real, rate, standardisation)
            own = real
        else:
            source, own = resolve(one, real, other_data, progress is not False)
            parts = None
        real = real or own
        plan = schedule(protocol, standardisation or source.standardisation or "mtt", False,
                        rate if rate is not None else source.rate, epochs, precision)
        made.append(_Memory(source, own.to(device), parts, plan))
    classes = real.geometry.classes
    steps = _agree(steps, [m.parts for m in made if m.parts is not None], classes)
    splits = {run: split(classes, steps, run) for run in range(seed, seed + runs)}
    sizes = {tuple(map(len, m.parts or splits[seed])) for m in made}
    if len(sizes) > 1:
        raise ConfigError("the steps of these have different numbers of classes: learn them one at a time")
    curves: list[Curve] = []
    with Pool(device, threads) as pool:
        total = sum(memory.plan.epochs for memory in made) * steps * len(names) * runs
        hidden = no_bar(progress)
        with tqdm(total=total, desc="learning step by step", unit="epoch", leave=False, disable=hidden) as bar:
            for memory in made:
                curves += _learn(memory, names, splits, pool, bar.update, hidden)
    return ContinualReport(list(itertools.accumulate(sizes.pop())), [memory.describe() for memory in made], curves,
                           real.describe(), list(splits), device_name(device), time.monotonic() - started)


@dataclass(frozen=True)
class _Memory:
    """parts: the classes of each step, or None where each run splits them by its seed; real: what it is tested on."""

    source: sources.Source
    real: RealData
    parts: list[list[int]] | None
    plan: Schedule

    def describe(self) -> dict[str, Any]:
        how = "a file for each step" if self.parts else "classes split at random, anew for each run, of one memory"
        return {"source": self.source.title, "images": self.source.size, "storage": self.source.storage, "split": how,
                "standardisation": "speed" if self.plan.standardise else "mtt", "schedule": str(self.plan)}


def split(classes: int, steps: int, seed: int) -> list[list[int]]:
    """The classes in an order that `seed` gives, cut into `steps` parts whose sizes differ by one at most."""
    order = torch.randperm(classes, generator=seeds.generator(seed, "continual classes"))
    return [part.tolist() for part in torch.tensor_split(order, steps)]


def part(data: ImageSet, seen: Sequence[int], classes: int) -> ImageSet:
    """The images of `data` that are of the classes `seen`, which are numbered in that order. Learned labels, float
    [N, classes], keep the columns of `seen`, scaled to a sum of 1; an image is of the class of its largest one."""
    device = data.labels.device
    number = torch.full((classes,), -1, device=device)
    number[torch.tensor(seen, device=device)] = torch.arange(len(seen), device=device)
    soft = data.labels.is_floating_point()
    own = data.labels.argmax(1) if soft else data.labels
    rows = (number[own] >= 0).nonzero()[:, 0]
    if soft:
        columns = data.labels[rows][:, torch.tensor(seen, device=device)]
        return ImageSet(lambda index: data.fetch(rows[index]), columns / columns.sum(1, keepdim=True))
    return ImageSet(lambda index: data.fetch(rows[index]), number[own[rows]])


def _agree(steps: int | None, folders: list[list[list[int]]], classes: int) -> int:
    """The number of steps that was asked for and that the folders have."""
    counts = {len(parts) for parts in folders} | ({steps} if steps is not None else set())
    if len(counts) > 1:
        raise ConfigError(f"these do not go together: {' and '.join(str(n) for n in sorted(counts))} steps (a folder "
                          "has as many as files)")
    chosen = counts.pop() if counts else STEPS
    if not 1 <= chosen <= classes // 2:
        raise ConfigError(f"{classes} classes cannot be learned in {chosen} steps: each needs two or more classes")
    return chosen


def _learn(memory: _Memory, names: list[str], splits: dict[int, list[list[int]]], pool: Pool,
           tick: Callable[[], object], hidden: bool | None) -> list[Curve]:
    """A curve for each network: all runs of a step are trained by one call."""
    real, plan = memory.real, memory.plan
    classes = real.geometry.classes
    images = {seed: memory.source.images(seed, real, pool.device) for seed in splits}
    test = ImageSet(lambda index: real.normalised("test", index), real.test.labels)
    curves = {name: Curve(memory.source.title, name, [], []) for name in names}
    for step in range(len(memory.parts or splits[min(splits)])):
        seen = {seed: [label for some in (memory.parts or parts)[:step + 1] for label in some]
                for seed, parts in splits.items()}
        geometry = dataclasses.replace(real.geometry, classes=len(seen[min(splits)]))
        trained = train.train_all(names, {seed: part(images[seed], seen[seed], classes) for seed in splits}, geometry,
                                  plan, pool, tick)
        tests = {seed: part(test, labels, classes) for seed, labels in seen.items()}
        total = sum(math.ceil(len(tests[run.seed]) / plan.batch) for run in trained if run.failure is None)
        with tqdm(total=total, desc="testing", unit="batch", delay=2, leave=False, disable=hidden) as bar:
            found = [_accuracy(run, tests[run.seed], plan, pool, bar.update) for run in trained]
        for name, curve in curves.items():
            runs = [run for run in trained if run.network_name == name]
            curve.accuracies.append([a for run, a in zip(trained, found, strict=True) if run.network_name == name])
            curve.failures.extend(f"step {step + 1}, seed {run.seed}: {run.failure}" for run in runs if run.failure)
    return list(curves.values())


def _accuracy(run: train.Run, test: ImageSet, plan: Schedule, pool: Pool,
              tick: Callable[[], object]) -> float | None:
    if run.failure is not None:
        return None
    right, = training.accuracies([run.network], test, pool, batch=plan.batch, standardise=plan.standardise,
                                 precision=plan.precision, on_batch=tick)
    return round(100 * right, 6)
