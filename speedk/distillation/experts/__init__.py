"""Expert trajectories: networks trained on the real data by plain SGD, kept after every epoch.

Plain SGD has no state but the parameters, and what is random in epoch e of expert n depends on the seed, n and e alone;
so an expert that was interrupted, or is wanted for more epochs, goes on from its last row to the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path

import torch
from torch import Tensor, nn

from speedk import networks, seeds, training
from speedk.data import RealData, Subset, cache
from speedk.distillation import signals
from speedk.distillation.experts.folder import ExpertFolder, Identity
from speedk.errors import ConfigError, TrainingError
from speedk.geometry import Geometry
from speedk.precision import dtype_of
from speedk.text import counted
from speedk.training import ImageSet, separable
from speedk.workers import Pool, Stopped, single_threaded

TEST_IMAGES = 1000
"""Test images (evenly spaced) that the accuracy after each epoch is taken on: a part, as it is for information only
and all of them would take a tenth of the time."""

MEASURE_SECONDS = 1.0
"""What is measured for an estimate grows no more once three of its stretches take this long."""
_STRETCH = 16  # images of the first stretch, for each thread

SAVE_SECONDS = 30.0
POLL_SECONDS = 0.5

OnEpoch = Callable[[int, int, dict[str, float]], None]
"""Called, one call at a time, after each epoch with (epochs done, epochs in all, numbers of the expert it was of)."""


def place(identity: Identity) -> Path:
    """The folder in the user's cache for experts of `identity`. It need not exist."""
    name = f"{identity.dataset}-{identity.network}-{identity.key[:16]}"
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return cache.folder() / "experts" / name


def missing(folder: ExpertFolder, count: int, epochs: int) -> int:
    """Epochs that are to be trained until experts 0 .. count - 1 have `epochs` each."""
    return sum(max(0, epochs - max(0, folder.epochs(number))) for number in range(count))


def image_seconds(network: str, geometry: Geometry, device: torch.device | str = "cpu") -> float:
    """Seconds that a training step takes for each of its images, measured for a moment."""
    device = torch.device(device)
    student = networks.fresh(network, geometry, 0, device)
    with Pool(device) as pool:
        count = pool.images(geometry.resolution) * max(1, pool.threads)
        images = torch.zeros(count, geometry.channels, geometry.resolution, geometry.resolution, device=device)
        labels, times = torch.zeros(count, dtype=torch.int64, device=device), []
        for _ in range(3):
            began = time.perf_counter()
            training.in_pieces(pool, training.gradients, student, images, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times) / count


def epoch_seconds(identity: Identity, real: RealData, count: int, device: torch.device | str = "cpu") -> float:
    """Seconds that each epoch adds where `count` experts are trained, its test included: measured on a stretch of one,
    of two batches where they take no longer than a moment."""
    device, most = torch.device(device), min(2 * identity.batch, len(real.train))
    student = networks.fresh(identity.network, real.geometry, 0, device)
    with Pool(device) as pool:
        runners = min(count, _side_by_side_at_most(student, pool))
        students, images = [copy.deepcopy(student) for _ in range(runners)], min(most, _STRETCH * max(1, pool.threads))
        with single_threaded(runners) as threads:
            while True:
                part = _first(real, images).to(device)
                work = _Work(ExpertFolder(Path(), identity), part, 1, 1, lambda *_: None)
                times = []
                for _ in range(3):  # the first of which makes what is made once
                    began = time.perf_counter()
                    list(threads.map(lambda student, work=work: _stretch(work, student, pool), students))
                    times.append(time.perf_counter() - began)
                if images == most or sum(times) > MEASURE_SECONDS:
                    return min(times) / runners * len(real.train) / images
                images = min(most, 4 * images)


def _first(real: RealData, images: int) -> RealData:
    """The first `images` training images, and as large a part of the test images that a test takes."""
    tests = max(1, round(min(TEST_IMAGES, len(real.test)) * images / len(real.train)))
    train, test = (Subset(part.images[:rows], part.labels[:rows])
                   for part, rows in ((real.train, images), (real.test, tests)))
    return dataclasses.replace(real, train=train, test=test)


def _stretch(work: _Work, student: nn.Module, pool: Pool) -> None:
    """An epoch on what `work` has, and its test; nothing is kept."""
    _epoch(work, student, 0, 0, pool)
    _accuracy(work, student, pool)


def _side_by_side_at_most(student: nn.Module, pool: Pool) -> int:
    """Experts that are trained at once: one that draws or mixes has the threads for itself."""
    return max(1, pool.threads) if separable(student) else 1


def train(folder: ExpertFolder, real: RealData, count: int, epochs: int, device: torch.device | str = "cpu",
          threads: int | None = None, progress: OnEpoch = lambda *_: None) -> None:
    """Train until experts 0 .. count - 1 of `folder` have `epochs` epochs each; what is there stays.

    Several processes may do so at once: each expert is one's. On the CPU several experts share the `threads`, which do
    not change the numbers (but for networks with dropout). Ctrl-C and SIGTERM end it with a KeyboardInterrupt, once
    every finished epoch is saved. Raises ConfigError where the folder is for other data,
    TrainingError where an expert is not finite, ArtifactError where a file is damaged.
    """
    if count < 1 or epochs < 1:
        raise ConfigError(f"there is nothing to train: count={count}, epochs={epochs}")
    check_data(folder, real)
    device = torch.device(device)
    real = real.to(device)
    work = _Work(folder, real, epochs, missing(folder, count, epochs), progress)
    waiting = [number for number in range(count) if folder.epochs(number) < epochs]
    with signals.terminated_as_interrupted(), Pool(device, threads) as pool:
        work.train_set.fetch(torch.zeros(1, dtype=torch.int64, device=device))  # what is made once, before the threads
        first = networks.fresh(folder.identity.network, real.geometry, 0)
        size = networks.parameter_count(first)
        if size != folder.identity.parameters:  # a class of the user's own, changed since
            raise ConfigError(f"{folder.path} holds experts of {folder.identity.parameters:,} parameters, but "
                              f"{folder.identity.network} has {size:,}: choose another folder")
        most = _side_by_side_at_most(first, pool)
        while waiting:
            _side_by_side(work, waiting, pool, min(most, len(waiting)))
            waiting = [number for number in waiting if folder.epochs(number) < epochs]
            if waiting:  # others are at it: wait until they are done, or dead
                time.sleep(POLL_SECONDS)


def check_data(folder: ExpertFolder, real: RealData) -> None:
    """Raise ConfigError unless the experts of `folder` were trained on `real`, normalised as it is."""
    mine = dataclasses.replace(folder.identity, **dataclasses.asdict(real.geometry), data=real.fingerprint,
                               normaliser=real.normaliser.describe())
    folder.check_data(mine)


class _Work:
    """What the threads of one `train` share."""

    def __init__(self, folder: ExpertFolder, real: RealData, epochs: int, total: int, progress: OnEpoch) -> None:
        self.folder, self.epochs = folder, epochs
        self.train_set = ImageSet(lambda index: real.normalised("train", index), real.train.labels)
        rows = torch.linspace(0, len(real.test) - 1, min(TEST_IMAGES, len(real.test)), device=real.test.labels.device)
        rows = rows.long()
        self.test_set = ImageSet(lambda index: real.normalised("test", rows[index]), real.test.labels[rows])
        self.geometry = real.geometry
        self._lock, self._done, self._total, self._progress = threading.Lock(), 0, total, progress

    def tick(self, numbers: dict[str, float]) -> None:
        with self._lock:
            self._done += 1
            self._progress(self._done, max(self._done, self._total), numbers)


def _side_by_side(work: _Work, numbers: list[int], pool: Pool, runners: int) -> None:
    with single_threaded(runners) as threads:
        try:
            for done in as_completed([threads.submit(_claim_and_train, work, number, pool) for number in numbers]):
                done.result()
        except BaseException:
            pool.stopped = True
            threads.shutdown(cancel_futures=True)
            raise


def _claim_and_train(work: _Work, number: int, pool: Pool) -> None:
    with work.folder.claim(number) as mine:
        if mine:
            try:
                _train(work, number, pool)
            except Stopped:
                return


def _train(work: _Work, number: int, pool: Pool) -> None:
    folder, identity, device = work.folder, work.folder.identity, pool.device
    dtype, seed = dtype_of(identity.precision), seeds.derive(identity.seed, "expert", number)
    student = networks.fresh(identity.network, work.geometry, seeds.derive(seed, "start"), device)
    parameters = list(student.parameters())
    losses: list[float] = []
    if folder.epochs(number) >= 0:
        record, last = folder.last(number)
        with torch.no_grad():  # copied: a view into one long vector has another alignment, and so other last bits
            for p, values in zip(parameters, last.to(device).split([p.numel() for p in parameters]), strict=True):
                p.copy_(values.view_as(p))
        rows, losses, accuracies = list(folder.rows(number)), list(record.losses), list(record.accuracies)
    else:
        rows, accuracies = [_flat(parameters).to(dtype)], [_accuracy(work, student, pool)]

    saved, saved_at = len(losses), time.monotonic()
    try:
        for epoch in range(len(losses), work.epochs):
            loss = _epoch(work, student, seed, epoch, pool)
            theta = _flat(parameters)
            if not math.isfinite(loss) or not bool(theta.isfinite().all()):
                raise TrainingError(f"expert {number} is not finite after {counted(epoch + 1, 'epoch')} at a rate "
                                    f"of {identity.rate:g}: lower it (expert_rate), in another folder")
            accuracy = _accuracy(work, student, pool)
            last = theta
            rows.append(theta.to(dtype))
            losses.append(loss)
            accuracies.append(accuracy)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                folder.write(number, torch.stack(rows), last, losses, accuracies)
                saved, saved_at = len(losses), time.monotonic()
            work.tick({"loss": loss, "accuracy": accuracy})
    finally:
        if len(losses) > saved:
            folder.write(number, torch.stack(rows), last, losses, accuracies)


def _epoch(work: _Work, student: nn.Module, seed: int, epoch: int, pool: Pool) -> float:
    """Train a student for an epoch; returns the mean loss."""
    identity = work.folder.identity
    trained = [p for p in student.parameters() if p.requires_grad]  # what is frozen keeps its value, in theta too

    @torch.no_grad()
    def update() -> None:
        torch._foreach_add_(trained, [p.grad for p in trained], alpha=-identity.rate)

    student.train()  # the test left it otherwise, and only in training is there dropout to seed
    with training.seeded(student, seeds.derive(seed, "dropout", epoch), pool):
        return training.epoch(student, work.train_set, seeds.generator(seed, "epoch", epoch), pool, update,
                              batch=identity.batch, augment=identity.augment, standardise=identity.standardise)


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.parameters_to_vector(parameters).detach().cpu()


def _accuracy(work: _Work, student: nn.Module, pool: Pool) -> float:
    identity = work.folder.identity
    return training.accuracies([student], work.test_set, pool, batch=identity.batch,
                               standardise=identity.standardise)[0]
