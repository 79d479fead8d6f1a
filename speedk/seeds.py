"""Random streams that depend on nothing but a seed, a name and a step, so that a run resumes to the same bits."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, stream: str, step: int = 0) -> int:
    """A 63-bit seed of its own for each (seed, stream, step)."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A fresh CPU generator for one stream at one step."""
    return torch.Generator().manual_seed(derive(seed, stream, step))
