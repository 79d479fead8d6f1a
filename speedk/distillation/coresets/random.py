"""Real images drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.distillation.coresets.base import Coreset, Members


class Random(Coreset):
    """Uniform over the class, none twice."""

    name = "random"
    says = "real images drawn at random"

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(members.size, generator=generator)[:count]


PLUGIN = Random
