"""Real images that leave none of their class far from all of them (greedy; Sener and Savarese 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.distillation.coresets.base import Coreset, Members


class KCenter(Coreset):
    """Greedy: first the image nearest to the class's mean feature, then always the one that is furthest from all
    chosen. The largest distance to a chosen image is then at most twice the smallest possible."""

    name = "kcenter"
    looks_at = "features"
    says = "real images that leave none of their class far away, chosen furthest first"

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        features = members.features.double()
        chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
        nearest = torch.full((members.size,), torch.inf, dtype=torch.float64, device=features.device)
        while len(chosen) < count:
            nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
            nearest[chosen[-1]] = -1.0  # images that are alike are all at distance 0, and none is chosen twice
            chosen.append(int(nearest.argmax()))
        return torch.tensor(chosen)


PLUGIN = KCenter
