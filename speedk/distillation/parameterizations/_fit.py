"""A start for SPEED from real images: tokens, codes and decoder fitted by least squares with the top-k active."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from speedk import networks
from speedk.distillation.coresets.base import Members
from speedk.distillation.coresets.kmeans import KMeans
from speedk.errors import ConfigError
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.distillation.parameterizations.speed import Speed

JOINT = 2048
"""Images fitted together with the tokens and the decoder; the codes of any others follow, as many at a time."""

RATES = {"saet": 0.02, "scm": 0.02, "freenet": 0.01}
CANDIDATES, MIXED = 2000 * 32 * 32, 256
"""Pixels of the real images of a class that are clustered, about, and to how many numbers the features of each are
mixed down: with more of either, choosing takes longer than fitting."""

ANNEAL = 0.6
"""Share of the steps in which the number of active entries falls from a quarter of the code to k."""


def fit(synthetic: Speed, real, generator: torch.Generator, progress=None) -> None:
    """Fit `synthetic` to images_per_class training images of each class.

    They are drawn by `generator`, or are the nearest to the centres of as many clusters of their class, in the features
    of an untrained ConvNet (see `Spec.fit_to`).

    Adam on the squared error of the decoded images. Only the entries of largest magnitude of each code are active: from
    a quarter of them down to k, geometrically, so that the dictionary forms before the codes are sparse.
    `progress(done, total, numbers)` is called after each step; the error rises while the active entries get fewer.
    """
    spec, device = synthetic.spec, synthetic.saet.device
    pool = Pool(device)
    with pool:
        images = _targets(spec, real, generator, pool).to(device)
    order = torch.randperm(len(images), generator=generator).to(device)
    shared = [synthetic.saet, *synthetic.freenet.parameters()]
    parts = order.split(JOINT)
    for number, index in enumerate(parts):
        def report(step: int, loss: float, active: int, number: int = number) -> None:
            if progress is not None:
                progress(number * spec.fit_steps + step, len(parts) * spec.fit_steps,
                         {"squared error": loss, "active entries": active})
        with pool:
            _fit_part(synthetic, index, images[index], shared if number == 0 else [], pool, report)


def _targets(spec, real, generator: torch.Generator, pool: Pool) -> Tensor:
    """The images to fit, [N, C, H, W], class by class."""
    count, classes = spec.images_per_class, real.geometry.classes
    wanted = count if spec.fit_to == "random" else max(CANDIDATES // real.geometry.resolution**2, 4 * count)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    network = networks.fresh("convnet", real.geometry, seed, real.train.images.device).requires_grad_(False).eval()
    chosen = []
    for label in range(classes):
        drawn = real.sample(label, wanted, generator)
        if not len(drawn):
            raise ConfigError(f"class {label} has no training image to fit")
        if len(drawn) > count:
            parts = drawn.split(pool.images(real.geometry.resolution))
            features = torch.cat(pool.map(network.features, zip(parts)))
            mixed = torch.randn(features.shape[1], MIXED, generator=generator).to(features)  # keeps distances, about
            drawn = drawn[KMeans.choose(Members(len(drawn), features @ mixed), count, generator).to(drawn.device)]
        chosen.append(drawn[torch.arange(count, device=drawn.device) % len(drawn)])
    return torch.cat(chosen)


def _fit_part(synthetic: Speed, index: Tensor, images: Tensor, shared: list[Tensor], pool: Pool, report) -> None:
    spec, steps = synthetic.spec, synthetic.spec.fit_steps
    codes = synthetic.scm.detach()[index].requires_grad_()
    size = codes[0, 0].numel()
    groups = [{"params": [codes], "lr": RATES["scm"]}]
    if shared:
        groups += [{"params": shared[:1], "lr": RATES["saet"]}, {"params": shared[1:], "lr": RATES["freenet"]}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    first = max(spec.k, size // 4)
    piece = pool.images(synthetic.geometry.resolution)
    for step in range(steps):
        done = min(1.0, step / (ANNEAL * steps))
        active = round(first ** (1 - done) * spec.k ** done)
        found = pool.map(_gradients, [(synthetic, rows, shared, targets, active, images.numel())
                                      for rows, targets in zip(codes.detach().split(piece), images.split(piece))])
        loss = float(torch.stack([part for part, _, _ in found]).double().sum())
        codes.grad = torch.cat([gradient for _, gradient, _ in found])
        for tensor, *gradients in zip(shared, *(of_piece for _, _, of_piece in found)):
            tensor.grad = sum(gradients[1:], gradients[0])
        optimizer.step()
        schedule.step()
        report(step + 1, loss, active)
    with torch.no_grad():
        synthetic.scm[index] = synthetic.sparsify(codes, spec.k)
    for tensor in shared:
        tensor.grad = None


def _gradients(synthetic: Speed, rows: Tensor, shared: list[Tensor], targets: Tensor, active: int,
               count: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The part of the mean squared error that is of one piece, and its gradients for the piece's codes and `shared`."""
    with torch.enable_grad():
        codes = rows.requires_grad_()
        decoded = synthetic.freenet(synthetic.sparsify(codes, active), synthetic.saet)
        loss = (decoded - targets).square().sum() / count
    gradient, *of_shared = torch.autograd.grad(loss, [codes, *shared])
    return loss.detach(), gradient, tuple(of_shared)
