"""Real images that a network in training is most often right about, then wrong (Toneva et al. 2019).

An image that the network was never right about was never forgotten. The original sorts these before all others, which
chooses what is labelled wrongly: on CIFAR-10 a network trained on ten of them a class is below chance, and the
published rows are what counting gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.distillation.coresets.base import Coreset, Members


class Forgetting(Coreset):
    """The most often forgotten first; among equals, which are many, by chance."""

    name = "forgetting"
    looks_at = "forgotten"
    says = "real images that were most often forgotten in training"

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        order = torch.randperm(members.size, generator=generator)
        return order[members.forgotten.cpu()[order].argsort(descending=True, stable=True)][:count]


PLUGIN = Forgetting
