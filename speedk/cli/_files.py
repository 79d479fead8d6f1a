"""Names of files and folders, as the commands take and give them alike."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from speedk.distillation import runfiles


def distilled_file(path: str | Path) -> Path:
    """`path`, or the distilled file in it where it is a run directory."""
    inside = Path(path) / runfiles.DISTILLED
    return inside if inside.is_file() else Path(path)


LONGEST = 200
"""Bytes of a folder's name, of the 255 that file systems allow."""


def flat(name: str) -> str:
    """`name`, of a folder that is made of what a user said, without folders in it, and no longer than a name may be:
    the end of a longer one is its checksum."""
    name = name.replace("/", "_")
    whole = os.fsencode(name)
    if len(whole) <= LONGEST:
        return name
    checksum = hashlib.sha256(whole).hexdigest()[:16]
    return whole[:LONGEST - len(checksum) - 1].decode(errors="ignore") + "-" + checksum
