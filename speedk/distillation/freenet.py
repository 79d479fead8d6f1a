"""FReeNet as a module: the parameters that `speedk.ops.freenet` works with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from speedk import ops
from speedk.ops.freenet_block import EPS, NORMS

SHARED = ("both", "saet", "none")


class Block(nn.Module):
    """One recurrent block of Eq. 4: 3 D^2 + 7 D parameters."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.projection = nn.Linear(D, D)
        self.norm1 = nn.LayerNorm(D, eps=EPS)
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=EPS)

    def weights(self) -> ops.BlockWeights:
        layers = (self.projection, self.norm1, self.fc1, self.fc2, self.norm2)
        return ops.BlockWeights(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))


class FReeNet(nn.Module):
    """The Feature-Recurrent Network: codes and tokens to images (Eq. 2 to 4).

    D: feature dimension; R: blocks; channels, patch, patches: C, the side of a patch in pixels, and J.
    norm: "branch", Eq. 4 as printed, Z' = LN1(MHSC) + Z; or "sum", Z' = LN1(MHSC + Z), as the released code has it.
    The two are one function at R = 1. Linears start Xavier-uniform with zero biases, norms at 1 and 0.
    shared: what all blocks share (the paper's Table III): "both", tokens and codes, which is Eq. 4; "saet", the tokens,
    each block with heads of its own in the codes; or "none".
    convolutions: layers x + conv(x) on the image (its Table II), of `kernel` x `kernel`, with GELU before all but the
    first; they start at zero, where they change nothing.
    Raises ValueError for another norm or shared.
    """

    def __init__(self, D: int, R: int, channels: int, patch: int, patches: int, norm: str = "branch",
                 shared: str = "both", convolutions: int = 0, kernel: int = 3) -> None:
        super().__init__()
        for name, value, allowed in (("norm", norm, NORMS), ("shared", shared, SHARED)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        self.channels, self.patch, self.patches, self.norm, self.shared = channels, patch, patches, norm, shared
        self.blocks = nn.ModuleList(Block(D) for _ in range(R))
        self.output = nn.Linear(D, patch * patch * channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(convolutions))
        for layer in self.convolutions:
            _zero(layer)

    @torch.no_grad()
    def reset(self, generator) -> None:
        """Draw the starting values from `generator`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                drawn = torch.empty_like(module.weight, device="cpu")
                module.weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                _zero(module)

    def weights(self) -> ops.FReeNetWeights:
        blocks = tuple(block.weights() for block in self.blocks)
        return ops.FReeNetWeights(blocks, self.output.weight, self.output.bias, self.channels, self.patch, self.patches,
                                  self.norm)

    def forward(self, scm: Tensor, saet: Tensor) -> Tensor:
        """scm: [N, H, J, K]; saet: [K, D]. Returns [N, C, H, W], normalised.

        Where blocks have codes of their own scm is [N, R H, J, K], block by block; where they have tokens of their own
        saet is [R, K, D].
        """
        if self.shared == "both":
            return self._convolve(ops.freenet(scm, saet, self.weights()))
        of_blocks = zip(scm.chunk(len(self.blocks), dim=1), self._tokens(saet), strict=True)
        return self._recur([ops.mhsc(codes, tokens) for codes, tokens in of_blocks])

    def decode(self, values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor) -> Tensor:
        """`forward` from stored entries, [N, H, k] (or [N, R H, k]) each."""
        if self.shared == "both":
            return self._convolve(ops.freenet_coo(values, rows, cols, saet, self.weights()))
        parts = zip(*(part.chunk(len(self.blocks), dim=1) for part in (values, rows, cols)), self._tokens(saet))
        return self._recur([ops.mhsc_coo(*entries, tokens, self.patches) for *entries, tokens in parts])

    def _tokens(self, saet: Tensor) -> Sequence[Tensor]:
        """The tokens of each block."""
        return list(saet) if saet.ndim == 3 else [saet] * len(self.blocks)

    def _recur(self, features: list[Tensor]) -> Tensor:
        """Eq. 4 with the result of each block's own MHSC."""
        state = None
        for block, of_block in zip(self.blocks, features, strict=True):
            state = ops.freenet_block(of_block, state, block.weights(), self.norm)
        return self._convolve(ops.tokens_to_images(state, self.output.weight, self.output.bias, self.channels,
                                                   self.patch))

    def _convolve(self, images: Tensor) -> Tensor:
        for number, layer in enumerate(self.convolutions):
            images = images + layer(gelu(images) if number else images)
        return images


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
