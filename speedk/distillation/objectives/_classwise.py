"""What the objectives that match class by class have alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from speedk import networks, seeds
from speedk.augment import dsa
from speedk.distillation.objectives.base import Objective
from speedk.distillation.parameterizations.base import Parameterization, detached
from speedk.workers import Pool

HELD = 4
"""Pieces of a class whose graph is held at once; a class of more is walked twice, a piece at a time."""


class Classwise(Objective):
    """A sum over classes, each of which is matched with a batch of its real images. The recipe has `batch`, `augment`
    and `lr`; a step takes `_decoded` and, in it, `_walk`, whose `match` begins with `_drawn`, all in the pool."""

    held_real: ClassVar[int]
    """Real images that are held at once, about."""

    features: ClassVar[bool] = False
    """Whether the student needs an embedding."""

    def __init__(self, spec, real, seed: int, device: torch.device) -> None:
        super().__init__(spec, real, seed, device)
        self._pool = Pool(device)

    def check_student(self) -> None:
        self._fresh(0)

    def _fresh(self, number: int) -> nn.Module:
        return networks.student(self.spec.network, self.real.geometry, seeds.derive(self.seed, "student", number),
                                self.device, features=self.features, precision=self.spec.precision)

    def _decoded(self, synthetic: Parameterization) -> tuple[list[Tensor], list[Tensor]]:
        """Of each class the numbers of its images, and the images."""
        members = [(synthetic.classes == label).nonzero()[:, 0] for label in range(self.real.geometry.classes)]
        images = [images for images, _ in self._pool.map(detached, [(synthetic, index) for index in members])]
        return members, images

    def _walk(self, synthetic: Parameterization, members: list[Tensor],
              match: Callable[[list[int]], Iterable[tuple[Tensor, Tensor]]]) -> dict[str, float]:
        """The step's numbers, where `match` gives loss and gradient of each class of a few labels."""
        loss, gradients = 0.0, []
        # A few classes at a time bound the real images that are held.
        for labels in torch.arange(len(members)).split(max(1, self.held_real // self.spec.batch)):
            for found, gradient in match(labels.tolist()):
                loss += float(found)
                gradients.append(gradient)
        synthetic.accumulate(torch.cat(members), torch.cat(gradients), pool=self._pool)
        return {"loss": loss}

    def _drawn(self, labels: list[int], generator: torch.Generator
               ) -> tuple[dict[int, Tensor], dict[int, dsa.Draw | None]]:
        """Of each class real images, and the augmentation that they and the synthetic ones get."""
        real = {label: self.real.sample(label, self.spec.batch, generator) for label in labels}
        draws = {label: dsa.draw(1, self.real.geometry, generator, shared=True) if self.spec.augment else None
                 for label in labels}
        return real, draws

    def artifact_fields(self) -> dict[str, float]:
        return {"lr": self.spec.lr}


def summed(parts: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The sum over parts of each of their tensors."""
    return functools.reduce(lambda total, part: [a + b for a, b in zip(total, part)], parts)


def of_means(loss: Callable[[Sequence[Tensor]], Tensor], terms: Callable[[Tensor], Sequence[Tensor]], images: Tensor,
             piece: int) -> tuple[Tensor, Tensor]:
    """`loss` of the means over `images` [n, C, H, W], and its gradient with respect to them. `terms` gives the sums
    over a piece of them, with a graph where gradients are enabled.

    piece: images of a piece. Where there are more than HELD pieces the means of all are found first, without a graph,
    and the slopes d loss / d sums; then each piece gets d <slopes, its sums> / d images.
    """
    pieces = [part.requires_grad_() for part in images.detach().split(piece)]
    if len(pieces) <= HELD:
        with torch.enable_grad():
            found = loss([total / len(images) for total in summed([terms(part) for part in pieces])])
        return found.detach(), torch.cat(torch.autograd.grad(found, pieces))
    with torch.no_grad():
        sums = summed(terms(part) for part in images.split(piece))
    with torch.enable_grad():
        means = [(total / len(images)).requires_grad_() for total in sums]
        found = loss(means)
    slopes = [slope / len(images) for slope in torch.autograd.grad(found, means)]
    gradients = []
    for part in pieces:
        with torch.enable_grad():
            sums = terms(part)
        gradients += torch.autograd.grad(sums, part, slopes)
    return found.detach(), torch.cat(gradients)
