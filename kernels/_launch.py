"""What every launcher needs: the device to launch on, and how precise a float32 product may be."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from speedk.precision import tf32_allowed


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the GPU of `tensor` current, as Triton launches on the current one; nothing to do on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: "tf32" for float32 where torch's own matmul may use it, else "tf32x3": each
    product of float32 values as three of their halves, which is as close, on the tensor cores; "ieee" for all others.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def block(size: int, smallest: int = 16, largest: int = 1 << 30) -> int:
    """The block that covers `size`: the next power of two, within [smallest, largest]; `tl.dot` needs 16."""
    return min(max(triton.next_power_of_2(size), smallest), largest)


def up_to(size: int, multiple: int) -> int:
    """The next multiple of `multiple` from `size` on."""
    return -(-size // multiple) * multiple


def padded(tensor: Tensor, *shape: int) -> Tensor:
    """`tensor` in memory order, with zeros beyond its ends up to `shape`, at an address that is a multiple of 16; the
    tensor itself where it is all that."""
    if tensor.shape == shape and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole


def cut(tensor: Tensor, *shape: int) -> Tensor:
    """What of a padded tensor is not padding, contiguous; the tensor itself where nothing is."""
    return tensor if tensor.shape == shape else tensor[tuple(slice(size) for size in shape)].contiguous()
