"""Train networks on an image set that lives in memory, several side by side, and test them.

On the CPU a batch is cut into small pieces, each the work of one thread, and the pieces of all runs feed one pool of
threads. Their gradients are summed in a fixed order, so the numbers do not depend on how many threads there are, and
a piece's activations stay in the cache, which alone saves a quarter of the time.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedk import networks
from speedk.augment import dsa
from speedk.distillation import seeds
from speedk.evaluation.schedule import Schedule
from speedk.geometry import Geometry

_PIECE = 32 * 32 * 32
"""Pixels (count x height x width) of one thread's piece of a batch: 32 images of 32 x 32."""


@dataclass(frozen=True)
class ImageSet:
    """`fetch` gives the normalised float32 images [B, C, H, W] of an int64 index [B]; labels are int64 [N] or float
    [N, classes]. Both are on the device that trains."""

    fetch: Callable[[Tensor], Tensor]
    labels: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, device: torch.device | str = "cpu") -> ImageSet:
        """The set of the normalised `images` [N, C, H, W]."""
        return cls(images.to(device).__getitem__, labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, standardise: bool = False) -> Tensor:
        """The images of `index`; with `standardise` less their mean, over their standard deviation."""
        images = self.fetch(index)
        if standardise:
            deviation, mean = torch.std_mean(images, correction=0)
            images = (images - mean) / deviation.clamp(min=1e-6)
        return images


@dataclass
class Run:
    """One network, trained once. seed: of its start and of its batches; failure: what stopped it, or None."""

    network_name: str
    seed: int
    network: nn.Module
    loss: float = math.nan
    failure: str | None = None
    accuracy: float | None = None


class Workers:
    """Does the pieces of a batch: on the CPU on a pool of `threads` (default: torch's own number, which follows
    OMP_NUM_THREADS); elsewhere a batch is one piece.

    To be used in a `with`, inside which torch itself uses one thread for an operation.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = (threads or torch.get_num_threads()) if device.type == "cpu" else 0
        self.stopped = False
        self._pool: ThreadPoolExecutor | None = None
        self._before = torch.get_num_threads()

    def __enter__(self) -> Workers:
        if self.threads:
            torch.set_num_threads(1)
            self._pool = single_threaded(self.threads)
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._before)

    def map(self, work: Callable[..., object], network: nn.Module, *batch: Tensor) -> list:
        """`work(network, *piece)` for each piece of the batch, in order. Raises Stopped once `stopped` is set."""
        if self.stopped:
            raise Stopped
        if self._pool is None or not separable(network):
            return [work(network, *batch)]
        piece = max(1, _PIECE // batch[0][0, 0].numel())
        return list(self._pool.map(lambda *part: work(network, *part), *(t.split(piece) for t in batch)))

    @contextlib.contextmanager
    def alone(self, seed: int) -> Iterator[None]:
        """For a network that draws from the global random state (dropout): that state seeded, and afterwards as it
        was; all threads for its operations."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            if self.threads:
                torch.set_num_threads(self.threads)
            yield
            if self.threads:
                torch.set_num_threads(1)


def single_threaded(count: int) -> ThreadPoolExecutor:
    """A pool of threads in which torch uses one thread for an operation.

    Each thread has to say so for itself: what another one said reaches torch's own loops but not the BLAS, whose sums
    would then depend on the number of threads.
    """
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


class Stopped(Exception):
    """Another run failed or the user interrupted: what is still running gives up."""


def separable(network: nn.Module) -> bool:
    """Whether each image is treated for itself and without chance, so that a batch may be cut and run in any order."""
    chance = (nn.Dropout, nn.modules.batchnorm._BatchNorm)
    return not (network.training and any(isinstance(m, chance) for m in network.modules()))


def train_all(names: Sequence[str], sets: Mapping[int, ImageSet], geometry: Geometry, schedule: Schedule,
              workers: Workers, on_epoch: Callable[[], None] = lambda: None) -> list[Run]:
    """Train a fresh network for each of `names` and each seed of `sets` on the images of that seed.

    A run whose loss or weights are not finite stops and says so. What a run gives depends on its network, its seed,
    its images and the schedule alone. `on_epoch` is called, one call at a time, after each epoch of each run, and once
    for each epoch that a failed run does not do.
    """
    runs = [Run(name, seed, networks.fresh(name, geometry, seeds.derive(seed, f"evaluate {name}"), workers.device))
            for name in names for seed in sets]
    lock = threading.Lock()

    def tick() -> None:
        with lock:
            on_epoch()

    for data in sets.values():  # what a set makes once and keeps is made before the threads
        data.fetch(torch.zeros(1, dtype=torch.int64, device=workers.device))
    side_by_side = [run for run in runs if workers.threads and separable(run.network)]
    with single_threaded(max(1, len(side_by_side))) as pool:
        try:
            for done in as_completed([pool.submit(_train, run, sets[run.seed], schedule, workers, tick)
                                      for run in side_by_side]):
                done.result()
        except BaseException:
            workers.stopped = True
            raise
    for run in runs:
        if run not in side_by_side:
            with workers.alone(seeds.derive(run.seed, "evaluate dropout")):
                _train(run, sets[run.seed], schedule, workers, tick)
    return runs


def train(network: nn.Module, data: ImageSet, schedule: Schedule, generator: torch.Generator, workers: Workers,
          on_epoch: Callable[[], None] = lambda: None) -> float:
    """Train `network` in place and return the mean loss of the last epoch that was trained.

    generator: on the CPU; gives the order of the images (a new permutation each epoch) and the augmentation. Training
    ends early where the loss is not finite; that loss is returned.
    """
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss = math.nan
    for epoch in range(schedule.epochs):
        if epoch in (0, schedule.drop):
            rate = schedule.rate * (0.1 if epoch else 1.0)
            optimiser = torch.optim.SGD(parameters, rate, schedule.momentum, weight_decay=schedule.weight_decay)
        total = torch.zeros((), device=workers.device)
        for index in torch.randperm(len(data), generator=generator).split(schedule.batch):
            index = index.to(workers.device)
            images = data.batch(index, schedule.standardise)
            if schedule.augment:
                images = dsa.apply(images, dsa.draw(len(images), images.shape[-1], generator))
            pieces = workers.map(_gradients, network, images, data.labels[index])
            for p, *parts in zip(parameters, *(gradients for _, gradients in pieces), strict=True):
                p.grad = sum(parts[1:], parts[0]) / len(images)
            optimiser.step()
            total += sum(part for part, _ in pieces)
        loss = float(total) / len(data)
        on_epoch()
        if not math.isfinite(loss):
            break
    return loss


@torch.no_grad()
def accuracies(nets: Sequence[nn.Module], data: ImageSet, schedule: Schedule, workers: Workers,
               on_batch: Callable[[], None] = lambda: None) -> list[float]:
    """The accuracy (0 to 1) of each network, in one pass over `data` in its stored order."""
    correct = [0] * len(nets)
    for net in nets:
        net.eval()
    for index in torch.arange(len(data)).split(schedule.batch):
        index = index.to(workers.device)
        images, labels = data.batch(index, schedule.standardise), data.labels[index]
        for i, net in enumerate(nets):
            correct[i] += sum(int(n) for n in workers.map(_correct, net, images, labels))
        on_batch()
    return [n / len(data) for n in correct]


def _train(run: Run, data: ImageSet, schedule: Schedule, workers: Workers, tick: Callable[[], None]) -> None:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        tick()

    generator = seeds.generator(run.seed, f"evaluate {run.network_name} batches")
    run.loss = train(run.network, data, schedule, generator, workers, count)
    if not math.isfinite(run.loss) or not all(bool(p.isfinite().all()) for p in run.network.parameters()):
        run.failure = f"training was not finite in epoch {done:,} of {schedule.epochs:,} at a rate of {schedule.rate:g}"
        for _ in range(schedule.epochs - done):
            tick()


def _gradients(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The summed loss of a piece and its gradients, in the order of the parameters."""
    with torch.enable_grad():
        loss = F.cross_entropy(network(images), labels, reduction="sum")
        return loss.detach(), list(torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad]))


@torch.no_grad()
def _correct(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return (network(images).argmax(1) == labels).sum()
