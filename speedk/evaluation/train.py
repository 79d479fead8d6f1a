"""Train networks on an image set, on the CPU several side by side; the step itself is `speedk.training`'s."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

import torch
from torch import nn

from speedk import networks, seeds, training
from speedk.geometry import Geometry
from speedk.schedule import Schedule
from speedk.training import ImageSet, separable
from speedk.workers import Pool, single_threaded


@dataclass
class Run:
    """One network, trained once. seed: of its start and of its batches; failure: what stopped it, or None."""

    network_name: str
    seed: int
    network: nn.Module
    loss: float = math.nan
    failure: str | None = None
    accuracy: float | None = None


def train_all(names: Sequence[str], sets: Mapping[int, ImageSet], geometry: Geometry, schedule: Schedule,
              pool: Pool, on_epoch: Callable[[], None] = lambda: None) -> list[Run]:
    """Train a fresh network for each of `names` and each seed of `sets` on the images of that seed.

    A run whose loss or weights are not finite stops and says so. What a run gives depends on its network, its seed,
    its images and the schedule alone. `on_epoch` is called, one call at a time, after each epoch of each run, and once
    for each epoch that a failed run does not do.
    """
    runs = [Run(name, seed, networks.fresh(name, geometry, seeds.derive(seed, f"evaluate {name}"), pool.device))
            for name in names for seed in sets]
    lock = threading.Lock()

    def tick() -> None:
        with lock:
            on_epoch()

    for data in sets.values():  # what a set makes once and keeps is made before the threads
        data.fetch(torch.zeros(1, dtype=torch.int64, device=pool.device))
    side_by_side = [run for run in runs if pool.threads and separable(run.network)]
    # A pool of one thread has none of its own, so only one run at a time may use it.
    with single_threaded(max(1, len(side_by_side) if pool.threads > 1 else 1)) as runners:
        try:
            for done in as_completed([runners.submit(_train, run, sets[run.seed], schedule, pool, tick)
                                      for run in side_by_side]):
                done.result()
        except BaseException:
            pool.stopped = True
            raise
    for run in runs:
        if run not in side_by_side:
            with training.seeded(run.network, seeds.derive(run.seed, "evaluate dropout"), pool):
                _train(run, sets[run.seed], schedule, pool, tick)
    return runs


def _train(run: Run, data: ImageSet, schedule: Schedule, pool: Pool, tick: Callable[[], None]) -> None:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        tick()

    generator = seeds.generator(run.seed, f"evaluate {run.network_name} batches")
    run.loss = training.train(run.network, data, schedule, generator, pool, count)
    if not math.isfinite(run.loss) or not all(bool(p.isfinite().all()) for p in run.network.parameters()):
        run.failure = f"training was not finite in epoch {done:,} of {schedule.epochs:,} at a rate of {schedule.rate:g}"
        for _ in range(schedule.epochs - done):
            tick()
