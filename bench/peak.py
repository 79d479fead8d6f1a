"""What a call takes of the memory: for the benches, and for the tests that hold it to a bound."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

MMAP_THRESHOLD = -3  # the number of that option of glibc's mallopt


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Memory that `call` takes at its peak beyond what is held before, or None where the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 16)  # no tensor is taken from what was freed before, and all go back at once
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except (OSError, AttributeError):
        return None
    before = _status()["VmRSS"]
    result = call()
    after = _status()["VmHWM"]
    del result
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)  # where glibc itself ends up in a process that frees large blocks
    return max(after - before, 0)


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}
