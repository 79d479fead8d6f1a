"""The recipes' own shapes, and inputs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from measuring import DEVICE, dtype_of, precisions

from speedk.ops import BlockWeights, FReeNetWeights, coo_encode

IN_EACH_PRECISION = pytest.mark.parametrize("precision", precisions())


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

    def scm(self, precision: str = "float32") -> torch.Tensor:
        return torch.randn(self.N, self.H, self.J, self.K, device=DEVICE, dtype=dtype_of(precision))

    def saet(self, precision: str = "float32") -> torch.Tensor:
        return torch.randn(self.K, self.D, device=DEVICE, dtype=dtype_of(precision))

    def entries(self, precision: str = "float32") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pieces = [coo_encode(piece, self.k) for piece in self.scm(precision).split(16384)]
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def images(self, precision: str = "float32") -> torch.Tensor:
        return torch.randn(self.N, self.channels, self.side, self.side, device=DEVICE, dtype=dtype_of(precision))

    def weights(self, precision: str = "float32") -> FReeNetWeights:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE, dtype=dtype_of(precision))

        def linear(out: int) -> tuple[torch.Tensor, torch.Tensor]:
            return draw(out, self.D) * self.D**-0.5, draw(out) * 0.1

        def norm() -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones_like(draw(self.D)), torch.zeros_like(draw(self.D))

        blocks = tuple(BlockWeights(*linear(self.D), *norm(), *linear(self.D), *linear(self.D), *norm())
                       for _ in range(self.R))  # fmt: skip
        return FReeNetWeights(blocks, *linear(self.L), self.channels, self.patch, self.J)


SMALL = Case("cifar10-ipc1", 170, 2, 64, 16, 32, 1, 48, 4)
MIDDLE = Case("cifar10-ipc10", 1240, 3, 64, 64, 96, 1, 48, 4)
DEEP = Case("cifar10-ipc50-batch", 256, 6, 64, 64, 192, 3, 48, 4)
LARGE = Case("imagenet-ipc1", 150, 4, 256, 256, 192, 2, 192, 8)

# Storehouses of images of CIFAR-10's size, decoded on a GPU, as SMALL, MIDDLE and DEEP decode theirs.
MANY = [replace(case, name=f"cifar10 D={case.D} N=131072", N=131_072) for case in (SMALL, MIDDLE, DEEP)]
