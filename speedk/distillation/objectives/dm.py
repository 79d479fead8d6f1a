"""Distribution matching (Zhao and Bilen, WACV 2023) over random networks, with siamese augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedk import seeds
from speedk.augment import dsa
from speedk.distillation.objectives._classwise import Classwise, of_means
from speedk.distillation.objectives.base import ObjectiveSpec
from speedk.distillation.parameterizations.base import Parameterization
from speedk.errors import ConfigError


@dataclass(frozen=True)
class Spec(ObjectiveSpec):
    """Recipe fields. batch: real images of a class in each step. augment: siamese DSA. lr: the rate that evaluation
    trains at."""

    batch: int = 256
    augment: bool = True
    lr: float = 0.01

    def check(self) -> None:
        super().check()
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} must be at least 1")
        self.check_rates("lr")


class DistributionMatching(Classwise):
    """Squared distance of mean embeddings, summed over classes, in a freshly drawn network each step.

    For each class the real and the synthetic images get one and the same augmentation with the same parameters.
    """

    Spec = Spec
    name = "dm"
    held_real = 4096
    features = True

    @classmethod
    def outer(cls, method: str, ipc: int) -> dict[str, Any]:
        """As many steps as most of the shipped recipes have; for pixels the original's rate."""
        return {"steps": 2000} | ({"rates": {"pixels": 1.0}} if method == "pixels" else {})

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        generator = seeds.generator(self.seed, "dm", step)
        student = self._fresh(step).requires_grad_(False)
        with self._pool, torch.no_grad():
            members, decoded = self._decoded(synthetic)
            return self._walk(synthetic, members,
                              lambda labels: self._match(student, decoded, labels, generator))

    def _match(self, student: nn.Module, decoded: list[Tensor], labels: list[int],
               generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """Loss and gradient of each class of `labels`."""
        pool = self._pool
        piece = pool.images(self.real.geometry.resolution)
        real, draws = self._drawn(labels, generator)
        parts = [(label, part) for label in labels for part in real[label].split(piece)]
        sums = pool.map(_features, [(student, part, draws[label]) for label, part in parts])
        targets = dict.fromkeys(labels, 0)
        for (label, _), of_part in zip(parts, sums, strict=True):
            targets[label] = targets[label] + of_part / len(real[label])
        return pool.map(_distance, [(student, decoded[label], targets[label], draws[label], piece) for label in labels])


def _features(student: nn.Module, images: Tensor, draw: dsa.Draw | None) -> Tensor:
    """The sum of the embeddings [F] of images as the student sees them."""
    return student.features(images if draw is None else dsa.apply(images, draw)).sum(dim=0)


def _distance(student: nn.Module, images: Tensor, target: Tensor, draw: dsa.Draw | None,
              piece: int) -> tuple[Tensor, Tensor]:
    """||target - mean embedding||^2 of one class, and its gradient with respect to the class's images."""
    return of_means(lambda means: (means[0] - target).square().sum(), lambda part: [_features(student, part, draw)],
                    images, piece)


PLUGIN = DistributionMatching
