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


def tf32_allowed() -> bool:
    """Whether torch's float32 products on a GPU may be computed in tf32. `fp32_precision` is asked first: reading
    `allow_tf32` raises where the two ways of setting it were mixed."""
    import torch

    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    return setting == "tf32" if setting is not None else matmul.allow_tf32
