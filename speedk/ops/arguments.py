"""What every op asks of its tensors, however it is called: kernels trust sizes, dtypes and devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def alike(*, indices: Mapping[str, Tensor] | None = None, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all `tensors` (None is passed over) share one floating dtype and, with `indices`, one
    device."""
    first = None
    for other, tensor in tensors.items():  # once through, as small ops wait for this
        if tensor is None:
            continue
        if first is None:
            name, first, dtype, device = other, tensor, tensor.dtype, tensor.device
            if not dtype.is_floating_point:
                raise ValueError(f"{name} must be of a floating dtype, got {dtype}")
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"{other} is {tensor.dtype} but {name} is {dtype}")
        if tensor.device != device:
            raise ValueError(f"{other} is on {tensor.device} but {name} is on {device}")
    for other, tensor in (indices or {}).items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{other} must be of an integer dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{other} is on {tensor.device} but {name} is on {device}")


def shaped(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has this shape."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
