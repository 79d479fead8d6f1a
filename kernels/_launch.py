"""What every launcher needs: the device to launch on, and how precise a float32 product may be."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the GPU of `tensor` current, as Triton launches on the current one; nothing to do on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: "tf32" for float32 where torch's own matmul may use it, else "ieee".

    `fp32_precision` is asked first: reading `allow_tf32` raises where the two ways of setting it were mixed.
    """
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    allowed = setting == "tf32" if setting is not None else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def block(size: int, smallest: int = 16, largest: int = 1 << 30) -> int:
    """The block that covers `size`: the next power of two, within [smallest, largest]; `tl.dot` needs 16."""
    return min(max(triton.next_power_of_2(size), smallest), largest)
