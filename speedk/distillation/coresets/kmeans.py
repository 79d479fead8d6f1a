"""Real images nearest to the centres of as many clusters of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.distillation.coresets.base import Coreset, Members


class KMeans(Coreset):
    """Lloyd's algorithm from k-means++, the best of three starts; the largest cluster's image first."""

    name = "kmeans"
    looks_at = "features"
    says = "real images nearest to the centres of clusters of their class"

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        from sklearn import cluster
        from threadpoolctl import threadpool_limits

        features = members.features.double().cpu()
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        with threadpool_limits(1):  # several threads add up in any order
            found = cluster.KMeans(count, n_init=3, random_state=seed).fit(features.numpy())
        sizes = torch.bincount(torch.from_numpy(found.labels_).long(), minlength=count)
        chosen: list[int] = []
        for centre in torch.from_numpy(found.cluster_centers_)[sizes.argsort(descending=True, stable=True)]:
            distance = (features - centre).square().sum(1)
            distance[chosen] = torch.inf
            chosen.append(int(distance.argmin()))
        return torch.tensor(chosen)


PLUGIN = KMeans
