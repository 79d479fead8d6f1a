"""What is known of the set in a run directory: how long it took, what it is, and how networks trained on it did."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speedk.distillation import runfiles
from speedk.files import write_atomic


class Record:
    """The file cell.json of the run directory `out`, as far as it is of `key`: JSON types, all that its set depends on.

    set: what the set is, {} where that is not known; results: pairs of a test and its result, for each network and each
    way in which it was tested. A file of another key, or of an older form, says nothing but the seconds.
    """

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self._path, self._key = out / runfiles.CELL, json.loads(json.dumps(key))
        document = _read(self._path)
        mine = document if document.get("key") == self._key else {"set": {}, "results": []}
        self.set: dict[str, Any] = mine["set"]
        self.results: list[list[dict[str, Any]]] = mine["results"]

    @property
    def complete(self) -> bool:
        """Whether the set is known, and is what it will be."""
        return bool(self.set) and self.set["steps"] == self.set["steps_of"]

    def answers(self, tests: Iterable[dict[str, Any]]) -> bool:
        """Whether nothing has to be run for the results of `tests`."""
        return self.complete and not any(map(self.lacks, tests))

    def of(self, made: dict[str, Any]) -> None:
        """The set is `made`: results of another one are forgotten."""
        if self.set.get("checksum") != made["checksum"]:
            self.results = []
        self.set = made

    def result(self, test: dict[str, Any]) -> dict[str, Any] | None:
        return next((result for known, result in self.results if known == test), None)

    def lacks(self, test: dict[str, Any]) -> bool:
        """Whether there is no result of `test`, or one of networks that did not train."""
        return (self.result(test) or {"mean": None})["mean"] is None

    def add(self, test: dict[str, Any], result: dict[str, Any]) -> None:
        self.results = [pair for pair in self.results if pair[0] != test] + [[test, result]]

    def write(self) -> None:
        _write(self._path, {"key": self._key, "set": self.set, "results": self.results,
                            "seconds": seconds(self._path.parent)})


def seconds(out: Path) -> float:
    """What distilling in the run directory `out` has taken, with all of its interruptions."""
    return float(_read(out / runfiles.CELL).get("seconds", 0.0))


def spend(out: Path, spent: float) -> None:
    """Add the seconds `spent` to those of the run directory `out`, if there is one."""
    if out.is_dir():
        _write(out / runfiles.CELL, {**_read(out / runfiles.CELL), "seconds": seconds(out) + spent})


def _read(path: Path) -> dict[str, Any]:
    """The document; empty where there is none, or none that can be read."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(path: Path, document: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=1).encode() + b"\n")
