"""The precisions that can be asked for by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "bf16")


def dtype_of(precision: str) -> torch.dtype:
    """The type of one of PRECISIONS."""
    import torch  # not where a command only lists their names

    return torch.bfloat16 if precision == "bf16" else torch.float32
