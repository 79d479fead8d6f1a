"""One cell of a table: a run that is distilled and evaluated, each as far as it has not been done yet."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speedk
from speedk.distillation import artifact
from speedk.distillation.loop import Progress
from speedk.distillation.plan import Plan
from speedk.evaluation.evaluate import evaluate
from speedk.files import write_atomic

NAME = "cell.json"


@dataclass(frozen=True)
class Evaluation:
    """How the finished file is tested: arguments of `speedk.evaluate`."""

    networks: tuple[str, ...] = ("convnet",)
    runs: int = 5
    protocol: str = "quick"
    epochs: int | None = None
    seed: int = 0


def found(made: Plan, how: Evaluation) -> dict[str, Any] | None:
    """What `measure` found in the run directory of `made` before, if that was all of it, or None."""
    earlier = _read(made.out / NAME)
    if earlier.get("wanted") != _wanted(made, how):
        return None
    line = earlier.get("found")
    complete = line is not None and line["steps"] == made.recipe.objective.steps and not _failed(line)
    return line if complete else None


def measure(made: Plan, how: Evaluation, *, minutes: float | None = None, progress: Progress | None = None,
            bars: bool | None = None) -> dict[str, Any]:
    """Distil and evaluate `made`, and return one line of JSON types that says what was measured and how.

    What was done before in its run directory is not done again; with `minutes`, distilling stops after so long, and the
    set is evaluated as it then is ("steps" of "steps_of"). The line also stays in the directory, as cell.json.
    """
    if (line := found(made, how)) is not None:
        return line
    record = made.out / NAME
    spent, began = float(_read(record).get("seconds", 0.0)), time.monotonic()
    try:
        path = made.run(resume=True, progress=progress, minutes=minutes)
    finally:  # an interrupted run goes on, and so does its clock
        if made.out.is_dir():
            spent += time.monotonic() - began
            _write(record, {"seconds": spent})
    report = evaluate(path, made.real, networks=how.networks, runs=how.runs, protocol=how.protocol, epochs=how.epochs,
                      seed=how.seed, device=made.device, progress=bars, out=made.out / "evaluation.json")
    line = _line(made, path, spent, report.to_dict())
    _write(record, {"seconds": spent, "wanted": _wanted(made, how), "found": line})
    return line


def _line(made: Plan, path: Path, seconds: float, report: dict[str, Any]) -> dict[str, Any]:
    recipe, loaded = made.recipe, artifact.load(path)
    steps = loaded.header["objective"].get("steps", recipe.objective.steps)
    return {
        "recipe": recipe.about.name, "dataset": made.real.name, "split": made.real.split, "ipc": recipe.data.ipc,
        "method": recipe.method, "objective": recipe.objective_name, "seed": recipe.run.seed,
        "steps": steps, "steps_of": recipe.objective.steps,
        "images_per_class": len(loaded) // made.real.geometry.classes,
        "numbers": loaded.header["numbers"], "budget": loaded.header["budget"],
        "distil_seconds": round(seconds, 1), "evaluate_seconds": report["seconds"], "device": report["device"],
        "protocol": report["protocol"], "evaluation_seed": report["seed"], "results": report["results"],
        "checksum": loaded.fingerprint, "version": speedk.__version__, "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _wanted(made: Plan, how: Evaluation) -> dict[str, Any]:
    return json.loads(json.dumps({"recipe": made.recipe.to_dict(), "data": made.real.fingerprint,
                                  "evaluation": dataclasses.asdict(how)}))


def _failed(line: dict[str, Any]) -> bool:
    return any(result["mean"] is None for result in line["results"])


def _commit() -> str:
    """The commit of the checkout that speedk runs from, or "" where it is installed."""
    root = Path(speedk.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip()


def _read(path: Path) -> dict[str, Any]:
    """The record of a cell; empty where there is none, or none that can be read."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(path: Path, document: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=1).encode() + b"\n")
