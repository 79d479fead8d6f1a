"""What a call takes of the memory, in tests: skipped where the system does not say."""

from __future__ import annotations

import peak
import pytest


def peak_bytes(call, device="cpu") -> int:
    """Memory that `call` takes at its peak, beyond what is held before."""
    taken = peak.peak_bytes(call, device)
    if taken is None:
        pytest.skip("the system does not tell a process its peak")
    return taken


def usual_peak(call, device="cpu") -> int:
    """The middle one of three: in a process that has done other work one may be off by some MB, either way."""
    return sorted(peak_bytes(call, device) for _ in range(3))[1]
