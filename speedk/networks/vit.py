"""A small vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedk.errors import ConfigError
from speedk.geometry import Geometry

HEAD = 64
"""Dimensions of one attention head."""


class ViT(nn.Module):
    """Patches of `patch` x `patch` pixels, a class token and learned positions; `depth` pre-norm blocks of `dim`
    dimensions, with `heads` heads of 64 and an MLP of `hidden` units; a norm and one linear layer on the class token.
    Dropout after the positions, on each block's attention output and in its MLP.

    Attention is torch's fused one; to differentiate twice, choose its MATH backend (`torch.nn.attention.sdpa_kernel`).
    """

    def __init__(self, geometry: Geometry, patch: int = 4, dim: int = 512, depth: int = 6, heads: int = 8,
                 hidden: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        if geometry.resolution % patch:
            raise ConfigError(f"vit cuts images into patches of {patch}, which does not divide {geometry.resolution}: "
                              "give another patch")
        self.patch = nn.Conv2d(geometry.channels, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (geometry.resolution // patch) ** 2 + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, geometry.classes)

    def features(self, images: Tensor) -> Tensor:
        """The embedding [B, dim] of images [B, C, H, W]."""
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1) + self.positions
        return self.norm(self.blocks(self.dropout(tokens))[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.classifier(self.features(images))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), the MLP with GELU."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values = nn.Linear(dim, 3 * heads * HEAD, bias=False)
        self.out = nn.Sequential(nn.Linear(heads * HEAD, dim), nn.Dropout(dropout))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim),
                                 nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        x = x + self._attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


PLUGIN = ViT
