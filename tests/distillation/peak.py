"""What a call takes of the memory."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch

MMAP_THRESHOLD = -3  # the number of that option of glibc's mallopt


def peak_bytes(call, device="cpu") -> int:
    """Memory that `call` takes at its peak, beyond what is held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(name: str) -> int:
        line, = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 16)  # no tensor is taken from what was freed before, and all go back at once
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except (OSError, AttributeError):
        pytest.skip("the system does not tell a process its peak")
    before = status("VmRSS")
    call()
    peak = status("VmHWM") - before
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)  # where glibc itself ends up in a process that frees large blocks
    return peak


def usual_peak(call, device="cpu") -> int:
    """The middle one of three: in a process that has done other work one may be off by some MB, either way."""
    return sorted(peak_bytes(call, device) for _ in range(3))[1]
