"""Gradient matching (Zhao, Mopuri and Bilen, ICLR 2021): real and synthetic images give a student like gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedk import networks, seeds, training
from speedk.augment import dsa
from speedk.distillation.objectives._classwise import Classwise, of_means, summed
from speedk.distillation.objectives.base import ObjectiveSpec
from speedk.distillation.parameterizations.base import Parameterization
from speedk.errors import ConfigError

LOOPS = ((1, 1, 1), (10, 10, 50), (20, 20, 25), (30, 30, 20), (40, 40, 15), (50, 50, 10))
"""(ipc, outer, inner) of the original."""

SHARE = 32
"""Images whose gradient is one piece of work, at least."""

EPS = 1e-6
"""Added to the product of two rows' lengths, as in the original."""


@dataclass(frozen=True)
class Spec(ObjectiveSpec):
    """Recipe fields. steps: matchings, each of which updates the set once. batch: real images of a class in each.

    outer: matchings with one student before a new one is drawn; inner: epochs that it trains on the synthetic set
    between two of them, in batches of inner_batch at the rate inner_rate; 0 for outer and inner means the original's of
    the images per class. augment: siamese DSA (the objective dsa). lr: the rate that evaluation trains at.
    """

    steps: int = 1000
    batch: int = 256
    outer: int = 0
    inner: int = 0
    inner_batch: int = 256
    inner_rate: float = 0.01
    augment: bool = False
    lr: float = 0.01

    def check(self) -> None:
        super().check()
        for name in ("batch", "inner_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("outer", "inner"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        self.check_rates("inner_rate", "lr")

    def loops(self, ipc: int) -> tuple[int, int]:
        """(outer, inner): as given, or those of the largest images per class in LOOPS that `ipc` reaches."""
        _, outer, inner = [row for row in LOOPS if row[0] <= ipc][-1]
        return self.outer or outer, self.inner or inner


def original_steps(ipc: int) -> int:
    """Matchings of the original: 1,000 students, each matched `outer` times."""
    return 1000 * Spec().loops(ipc)[0]


class GradientMatching(Classwise):
    """Sum over classes of the distance (`distance`) between the gradients of the cross-entropy of real and of synthetic
    images, in a student that is trained on the synthetic set between matchings and drawn anew after `outer` of them.
    """

    Spec = Spec
    name = "dc"
    held_real = 2048

    def __init__(self, spec: Spec, real, seed: int, device: torch.device) -> None:
        super().__init__(spec, real, seed, device)
        self._student: nn.Module | None = None

    @classmethod
    def outer(cls, method: str, ipc: int) -> dict[str, Any]:
        """The original's steps, and for pixels its rate."""
        return {"steps": original_steps(ipc)} | ({"rates": {"pixels": 0.1}} if method == "pixels" else {})

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        generator = seeds.generator(self.seed, self.name, step)
        outer, inner = self.spec.loops(synthetic.ipc)
        with self._pool, networks.twice_differentiable():
            members, decoded = self._decoded(synthetic)
            if step % outer == 0 or self._student is None:
                self._student = self._fresh(step // outer)
            else:
                self._train(torch.cat(decoded), synthetic.classes[torch.cat(members)], inner, generator)
            return self._walk(synthetic, members, lambda labels: self._match(decoded, labels, generator))

    def _match(self, decoded: list[Tensor], labels: list[int],
               generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """Loss and gradient of each class of `labels`."""
        student, pool = self._student, self._pool
        piece = pool.images(self.real.geometry.resolution)
        real, draws = self._drawn(labels, generator)
        weights = matched(student)
        parts = [(label, part) for label in labels for part in real[label].split(max(SHARE, piece))]
        sums = pool.map(_summed, [(student, weights, part, label, draws[label], piece) for label, part in parts])
        targets: dict[int, Sequence[Tensor]] = {}
        for (label, _), of_part in zip(parts, sums, strict=True):
            so_far = targets.get(label)
            targets[label] = of_part if so_far is None else summed([so_far, of_part])
        means = {label: [g / len(real[label]) for g in targets[label]] for label in labels}
        return pool.map(match, [(student, decoded[label], label, means[label], draws[label], piece)
                                for label in labels])

    def _train(self, images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> None:
        """Plain SGD of the student on the synthetic set."""
        spec, student = self.spec, self._student
        data = training.ImageSet.of(images, labels, self.device)
        optimizer = torch.optim.SGD(student.parameters(), spec.inner_rate)
        for _ in range(epochs):
            training.epoch(student, data, generator, self._pool, optimizer.step, batch=spec.inner_batch,
                           augment=spec.augment, standardise=False)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._student is None else {"student": dict(self._student.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._student = None
        if "student" in state:
            self._student = self._fresh(0)
            self._student.load_state_dict(state["student"])


def matched(student: nn.Module) -> list[Tensor]:
    """The parameters whose gradients are matched: those of two dimensions and more, not biases and norms."""
    return [p for p in student.parameters() if p.ndim > 1]


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """sum over layers and over output rows of 1 - cosine(row of `first`, row of `second`).

    Each is a list of gradients [out, ...], flattened to [out, rest]; those of one dimension contribute nothing.
    """
    total = first[0].new_zeros(())
    for a, b in zip(first, second, strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPS)).sum()
    return total


def match(student: nn.Module, images: Tensor, label: int, target: list[Tensor], draw: dsa.Draw | None,
          piece: int) -> tuple[Tensor, Tensor]:
    """The distance of one class's mean gradient from `target`, and its gradient with respect to `images` [n, C, H, W].

    piece: images that go through the student at a time.
    """
    weights = matched(student)
    return of_means(lambda means: distance(means, target),
                    lambda part: _gradient(student, weights, part, label, draw, torch.is_grad_enabled()), images, piece)


def _summed(student: nn.Module, weights: list[Tensor], images: Tensor, label: int, draw: dsa.Draw | None,
            piece: int) -> Sequence[Tensor]:
    """The gradient of the summed cross-entropy of all images, `piece` of them at a time."""
    return summed(_gradient(student, weights, part, label, draw) for part in images.split(piece))


def _gradient(student: nn.Module, weights: list[Tensor], images: Tensor, label: int, draw: dsa.Draw | None,
              create_graph: bool = False) -> tuple[Tensor, ...]:
    """Of the summed cross-entropy of images, as the student sees them, with respect to `weights`."""
    with torch.enable_grad():
        labels = torch.full((len(images),), label, device=images.device)
        logits = student(images if draw is None else dsa.apply(images, draw))
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, weights, create_graph=create_graph)


PLUGIN = GradientMatching
