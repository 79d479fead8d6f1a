"""What a call takes of the memory, in tests: skipped where the system does not say."""

from __future__ import annotations

import ctypes

import peak
import pytest
import torch


def peak_bytes(call, device="cpu") -> int:
    """Memory that `call` takes at its peak, beyond what is held before."""
    taken = peak.peak_bytes(call, device)
    if taken is None:
        pytest.skip("the system does not tell a process its peak")
    return taken


def usual_peak(call, device="cpu") -> int:
    """The middle one of three: in a process that has done other work one may be off by some MB, either way."""
    return sorted(peak_bytes(call, device) for _ in range(3))[1]


class _Malloc(ctypes.Structure):
    """glibc's mallinfo2: of each arena's blocks and of those that have a mapping of their own, how many bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def in_use(device="cpu") -> int:
    """Bytes that are allocated now and not freed: of this process alone, to the byte, whatever the system keeps."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        pytest.skip("this C library does not count what is allocated in 64 bits")
    mallinfo.restype = _Malloc
    now = mallinfo()
    return now.uordblks + now.hblkhd
