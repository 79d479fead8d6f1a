"""The folder of the user's where what is costly to compute is kept."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$SPEEDK_CACHE, else speedk under $XDG_CACHE_HOME, else ~/.cache/speedk. It need not exist."""
    if chosen := os.environ.get("SPEEDK_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "speedk"
