"""FReeNet as a module: the parameters that `speedk.ops.freenet` works with."""

from __future__ import annotations

from torch import Tensor, nn

from speedk import ops
from speedk.ops.freenet import NORMS


class Block(nn.Module):
    """One recurrent block of Eq. 4: 3 D^2 + 7 D parameters."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.projection = nn.Linear(D, D)
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)

    def weights(self) -> ops.BlockWeights:
        layers = (self.projection, self.norm1, self.fc1, self.fc2, self.norm2)
        return ops.BlockWeights(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))


class FReeNet(nn.Module):
    """The Feature-Recurrent Network: codes and tokens to images (Eq. 2 to 4).

    D: feature dimension; R: blocks; channels, patch, patches: C, the side of a patch in pixels, and J.
    norm: "branch", Eq. 4 as printed, Z' = LN1(MHSC) + Z; or "sum", Z' = LN1(MHSC + Z), as the released code has it.
    The two are one function at R = 1. Linears start Xavier-uniform with zero biases, norms at 1 and 0.
    """

    def __init__(self, D: int, R: int, channels: int, patch: int, patches: int, norm: str = "branch") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not one of {', '.join(NORMS)}")
        self.channels, self.patch, self.patches, self.norm = channels, patch, patches, norm
        self.blocks = nn.ModuleList(Block(D) for _ in range(R))
        self.output = nn.Linear(D, patch * patch * channels)

    def reset(self, generator) -> None:
        """Draw the starting values from `generator`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def weights(self) -> ops.FReeNetWeights:
        blocks = tuple(block.weights() for block in self.blocks)
        return ops.FReeNetWeights(blocks, self.output.weight, self.output.bias, self.channels, self.patch, self.patches,
                                  self.norm)

    def forward(self, scm: Tensor, saet: Tensor) -> Tensor:
        """scm: [N, H, J, K]; saet: [K, D]. Returns [N, C, H, W], normalised."""
        return ops.freenet(scm, saet, self.weights())
