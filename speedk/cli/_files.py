"""Names of files and folders, as the commands take and give them alike."""

from __future__ import annotations

from pathlib import Path

from speedk.distillation import runfiles


def distilled_file(path: str | Path) -> Path:
    """`path`, or the distilled file in it where it is a run directory."""
    inside = Path(path) / runfiles.DISTILLED
    return inside if inside.is_file() else Path(path)


def flat(name: str) -> str:
    """`name`, of a folder that is made of what a user said, without folders in it."""
    return name.replace("/", "_")
