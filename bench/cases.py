"""The recipes' own shapes, and inputs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from speedk.ops import BlockWeights, FReeNetWeights, coo_encode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A row of the paper's recipes: N images in all, or a training batch of them."""

    name: str
    N: int
    H: int
    J: int
    K: int
    D: int
    R: int
    k: int
    patch: int
    channels: int = 3

    @property
    def L(self) -> int:
        return self.patch**2 * self.channels

    @property
    def side(self) -> int:
        return round(self.J**0.5) * self.patch

    def scm(self) -> torch.Tensor:
        return torch.randn(self.N, self.H, self.J, self.K, device=DEVICE)

    def saet(self) -> torch.Tensor:
        return torch.randn(self.K, self.D, device=DEVICE)

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return coo_encode(self.scm(), self.k)

    def images(self) -> torch.Tensor:
        return torch.randn(self.N, self.channels, self.side, self.side, device=DEVICE)

    def weights(self) -> FReeNetWeights:
        def linear(out: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(out, self.D, device=DEVICE) * self.D**-0.5, torch.randn(out, device=DEVICE) * 0.1

        def norm() -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(self.D, device=DEVICE), torch.zeros(self.D, device=DEVICE)

        blocks = tuple(BlockWeights(*linear(self.D), *norm(), *linear(self.D), *linear(self.D), *norm())
                       for _ in range(self.R))  # fmt: skip
        return FReeNetWeights(blocks, *linear(self.L), self.channels, self.patch, self.J)


SMALL = Case("cifar10-ipc1", 170, 2, 64, 16, 32, 1, 48, 4)
MIDDLE = Case("cifar10-ipc10", 1240, 3, 64, 64, 96, 1, 48, 4)
DEEP = Case("cifar10-ipc50-batch", 256, 6, 64, 64, 192, 3, 48, 4)
LARGE = Case("imagenet-ipc1", 150, 4, 256, 256, 192, 2, 192, 8)
