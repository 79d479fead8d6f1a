"""Training on an image set that lives in memory: what evaluation and the experts of trajectory matching share.

On the CPU a batch is cut into small pieces, each the work of one thread, and the pieces of all runs feed one pool of
threads. Their gradients are summed in a fixed order, so the numbers do not depend on how many threads there are, and
a piece's activations stay in the cache, which alone saves a quarter of the time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedk.augment import dsa
from speedk.schedule import Schedule
from speedk.workers import Pool, Stopped


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


def separable(network: nn.Module) -> bool:
    """Whether each image is treated for itself and without chance, so that a batch may be cut and run in any order.

    Judged by the network's modules: `F.dropout` in a forward method of its own is not seen.
    """
    return not (network.training and any(map(_draws_or_mixes, network.modules())))


def _draws_or_mixes(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training, or looks at the batch as a whole."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.modules.batchnorm._BatchNorm)
    inside = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0
    return isinstance(module, kinds) or inside or getattr(module, "track_running_stats", False)


@contextlib.contextmanager
def seeded(network: nn.Module, seed: int, pool: Pool) -> Iterator[None]:
    """For a network that draws from the global random state (dropout): that state seeded, and afterwards as it was;
    all threads for its operations. Nothing for a network that can be cut into pieces."""
    if separable(network):
        yield
        return
    with torch.random.fork_rng(devices=[pool.device] if pool.device.type == "cuda" else []):
        torch.manual_seed(seed)
        if pool.threads:
            torch.set_num_threads(pool.threads)
        yield
        if pool.threads:
            torch.set_num_threads(1)


def epoch(network: nn.Module, data: ImageSet, generator: torch.Generator, pool: Pool, update: Callable[[], object], *,
          batch: int, augment: bool, standardise: bool, precision: str = "float32",
          on_answers: Callable[[Tensor, Tensor], object] | None = None) -> float:
    """One pass over `data` in a new order, with `update` called on the gradients (of the mean loss) of each batch.

    generator: on the CPU; gives the order and the augmentation. precision: see `products`. on_answers: called, before
    each update, with the batch's index and whether the network was right about each image (bool [B]). Returns the mean
    loss. The same bits each time, where no operation of the network adds in an order of its own.
    """
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = torch.zeros((), device=data.labels.device)
    with repeatable(data.labels.device):
        for index in torch.randperm(len(data), generator=generator).to(data.labels.device).split(batch):
            images = data.batch(index, standardise)
            if augment:
                images = dsa.apply(images, dsa.draw(len(images), images.shape[-1], generator))
            right = [] if on_answers is None else [torch.empty(len(index), dtype=torch.bool, device=index.device)]
            work = functools.partial(gradients, precision=precision)
            pieces = in_pieces(pool, work, network, images, data.labels[index], *right)
            if on_answers is not None:
                on_answers(index, *right)
            for p, *parts in zip(parameters, *(found for _, found in pieces), strict=True):
                p.grad = sum(parts[1:], parts[0]) / len(images)
            update()
            total += sum(part for part, _ in pieces)
    return float(total) / len(data)


def train(network: nn.Module, data: ImageSet, schedule: Schedule, generator: torch.Generator, pool: Pool,
          on_epoch: Callable[[], object] = lambda: None,
          on_answers: Callable[[Tensor, Tensor], object] | None = None) -> float:
    """Train `network` in place and return the mean loss of the last epoch that was trained.

    generator and on_answers as for `epoch`; on_epoch is called after each. Training ends early where the loss is not
    finite; that loss is returned.
    """
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss = math.nan
    for number in range(schedule.epochs):
        if number in (0, schedule.drop):
            rate = schedule.rate * (0.1 if number else 1.0)
            optimiser = torch.optim.SGD(parameters, rate, schedule.momentum, weight_decay=schedule.weight_decay)
        loss = epoch(network, data, generator, pool, optimiser.step, batch=schedule.batch, augment=schedule.augment,
                     standardise=schedule.standardise, precision=schedule.precision, on_answers=on_answers)
        on_epoch()
        if not math.isfinite(loss):
            break
    return loss


@torch.no_grad()
def accuracies(nets: Sequence[nn.Module], data: ImageSet, pool: Pool, *, batch: int, standardise: bool = False,
               precision: str = "float32", on_batch: Callable[[], None] = lambda: None) -> list[float]:
    """The accuracy (0 to 1) of each network, in one pass over `data` in its stored order."""
    correct, work = [0] * len(nets), functools.partial(_correct, precision=precision)
    for net in nets:
        net.eval()
    for index in torch.arange(len(data), device=data.labels.device).split(batch):
        images, labels = data.batch(index, standardise), data.labels[index]
        for i, net in enumerate(nets):
            correct[i] += sum(int(n) for n in in_pieces(pool, work, net, images, labels))
        on_batch()
    return [n / len(data) for n in correct]


def in_pieces(pool: Pool, work: Callable[..., object], network: nn.Module, *batch: Tensor) -> list:
    """`work(network, *piece)` for each piece of the batch (its first tensor are images), in order. Raises Stopped once
    the pool is."""
    if pool.stopped:
        raise Stopped
    if not pool.threads or not separable(network):
        return [work(network, *batch)]
    pieces = zip(*(t.split(pool.images(batch[0].shape[-1])) for t in batch), strict=True)
    return pool.map(work, [(network, *piece) for piece in pieces])


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN computes a convolution's gradients to the same bits each time. `benchmark` stays as the user has
    it: what it picks for a shape it keeps as long as the process lives."""
    if device.type != "cuda":
        yield
        return
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def products(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Inside, a network's convolutions and matrix products round their operands and results to `precision`: "bf16", or
    "float32", which they do not, but for what PyTorch is set to on a GPU: unless told otherwise, convolutions there
    round their operands to tf32. Parameters, their gradients and their updates stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def gradients(network: nn.Module, images: Tensor, labels: Tensor, right: Tensor | None = None, *,
              precision: str = "float32") -> tuple[Tensor, list[Tensor]]:
    """The summed loss of a piece and its gradients, in the order of the parameters; `right`, bool [B], takes whether
    each answer is (labels int64)."""
    with torch.enable_grad():
        with products(images.device, precision):
            logits = network(images)
        logits = logits.to(images.dtype)
        if right is not None:
            torch.eq(logits.detach().argmax(1), labels, out=right)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return loss.detach(), list(torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad]))


@torch.no_grad()
def _correct(network: nn.Module, images: Tensor, labels: Tensor, *, precision: str) -> Tensor:
    with products(images.device, precision):
        return (network(images).argmax(1) == labels).sum()
