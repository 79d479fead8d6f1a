"""Distribution matching (Zhao and Bilen, WACV 2023) over random networks, with siamese augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speedk import networks
from speedk.augment import dsa
from speedk.distillation import seeds
from speedk.distillation.objectives.base import Objective, ObjectiveSpec
from speedk.distillation.parameterizations.base import Parameterization
from speedk.errors import ConfigError


@dataclass(frozen=True)
class Spec(ObjectiveSpec):
    """Recipe fields. batch: real images of a class in each step. augment: siamese DSA. lr: the rate that evaluation
    trains at. chunk: images in one pass of the student, a bound on memory that changes no result but its rounding."""

    batch: int = 256
    augment: bool = True
    lr: float = 0.01
    chunk: int = 512

    def check(self) -> None:
        super().check()
        for name in ("batch", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr={self.lr} must be above 0")


class DistributionMatching(Objective):
    """Squared distance of mean embeddings, summed over classes, in a freshly drawn network each step.

    For each class the real and the synthetic images get one and the same augmentation with the same parameters.
    """

    Spec = Spec
    name = "dm"

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        spec, real = self.spec, self.real
        generator = seeds.generator(self.seed, "dm", step)
        student = networks.fresh(spec.network, real.geometry, seeds.derive(self.seed, "student", step), self.device)
        student.requires_grad_(False)
        total = torch.zeros((), device=self.device)
        for label in range(real.geometry.classes):
            index = (synthetic.classes == label).nonzero()[:, 0]
            images = real.sample(label, spec.batch, generator)
            draw = None
            if spec.augment:
                draw = dsa.draw(1, real.geometry.resolution, generator, shared=True)
            target = self._mean(student, images, draw)
            total += self._match(synthetic, student, index, target, draw)
        return {"loss": float(total)}

    @torch.no_grad()
    def _mean(self, student: torch.nn.Module, images: Tensor, draw: dsa.Draw | None) -> Tensor:
        total = 0
        for piece in images.split(self.spec.chunk):
            total = total + student.features(_augment(piece, draw)).sum(dim=0)
        return total / len(images)

    def _match(self, synthetic: Parameterization, student: torch.nn.Module, index: Tensor, target: Tensor,
               draw: dsa.Draw | None) -> Tensor:
        """||target - mean||^2 of one class; its gradient goes to `synthetic`, in pieces of `chunk` images."""
        pieces = index.split(self.spec.chunk)
        with torch.no_grad():
            decoded = [synthetic.decode(piece)[0] for piece in pieces]
        if len(pieces) > 1:
            # The gradient with respect to each embedding is the same vector, so a first pass finds it and a second
            # walks back piece by piece.
            with torch.no_grad():
                mean = sum(student.features(_augment(images, draw)).sum(dim=0) for images in decoded) / len(index)
            loss, slope = (mean - target).square().sum(), 2 * (mean - target) / len(index)
        for piece, images in zip(pieces, decoded, strict=True):
            images.requires_grad_()
            features = student.features(_augment(images, draw))
            if len(pieces) == 1:
                loss = (features.mean(dim=0) - target).square().sum()
                gradient, = torch.autograd.grad(loss, images)
            else:
                gradient, = torch.autograd.grad((features * slope).sum(), images)
            synthetic.accumulate(piece, gradient)
        return loss.detach()

    def artifact_fields(self) -> dict[str, float]:
        return {"lr": self.spec.lr}


def _augment(images: Tensor, draw: dsa.Draw | None) -> Tensor:
    return images if draw is None else dsa.apply(images, draw)


PLUGIN = DistributionMatching
