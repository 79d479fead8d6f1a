"""Real images whose mean feature is close to that of their class (Welling 2009)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.distillation.coresets.base import Coreset, Members


class Herding(Coreset):
    """Greedy: the next image is the one with which the mean feature of the chosen comes closest to the class's."""

    name = "herding"
    looks_at = "features"
    says = "real images whose mean feature is close to their class's"

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        features = members.features.double()
        mean, squares = features.mean(0), features.square().sum(1)
        total = torch.zeros_like(mean)
        chosen: list[int] = []
        for size in range(1, count + 1):
            # |mean - (total + f) / size|^2 is smallest where f is closest to what is missing.
            missing = size * mean - total
            distance = squares - 2 * (features @ missing)
            distance[chosen] = torch.inf
            chosen.append(int(distance.argmin()))
            total += features[chosen[-1]]
        return torch.tensor(chosen)


PLUGIN = Herding
