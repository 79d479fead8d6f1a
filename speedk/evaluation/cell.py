"""One cell of a table: a run that is distilled and evaluated, each as far as it has not been done yet."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import speedk
from speedk.distillation import artifact, coreset, runfiles
from speedk.distillation.loop import Progress
from speedk.distillation.plan import Plan
from speedk.errors import ArtifactError
from speedk.evaluation import sources
from speedk.evaluation.evaluate import evaluate
from speedk.evaluation.record import Record, seconds, spend
from speedk.files import write_atomic
from speedk.schedule import WHOLE, schedule

if TYPE_CHECKING:
    from speedk.data import RealData


@dataclass(frozen=True)
class Evaluation:
    """How the finished file is tested: arguments of `speedk.evaluate`. Raises ConfigError, before hours of distilling,
    where no network could be trained that way."""

    networks: tuple[str, ...] = ("convnet",)
    runs: int = 5
    protocol: str = "quick"
    epochs: int | None = None
    seed: int = 0
    standardisation: str | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        schedule(self.protocol, self.standardisation or "mtt", epochs=self.epochs, precision=self.precision)

    def tests(self) -> dict[str, dict[str, Any]]:
        """Of each network all that its result depends on, but for the set."""
        rest = {name: value for name, value in dataclasses.asdict(self).items() if name != "networks"}
        return {network: {"network": network, **rest} for network in self.networks}


def found(made: Plan, how: Evaluation) -> dict[str, Any] | None:
    """What `measure` found in the run directory of `made` before, if that was all of it, or None."""
    record = Record(made.out, _key(made.recipe.to_dict(), made.real))
    return _line(record, how) if record.answers(how.tests().values()) else None


def finished(out: Path) -> bool:
    """Whether the run in the directory `out` has made all of its steps."""
    try:
        return "steps" not in artifact.load(out / runfiles.DISTILLED).header["objective"]
    except ArtifactError:
        return False


def measure(made: Plan, how: Evaluation, *, minutes: float | None = None, progress: Progress | None = None,
            bars: bool | None = None) -> dict[str, Any]:
    """Distil and evaluate `made`, and return one line of JSON types that says what was measured and how.

    What was done before in its run directory is not done again, network by network; with `minutes`, distilling stops
    after so long, and the set is evaluated as it then is ("steps" of "steps_of"). All results stay in the directory as
    cell.json; its evaluation.json is the report of the latest, with what was known of the other networks of `how`.
    """
    made = dataclasses.replace(made, real=made.real.to(made.device))

    def distil() -> Path:
        return made.run(resume=True, progress=progress, minutes=minutes)

    def describe(path: Path) -> dict[str, Any]:
        recipe, loaded = made.recipe, artifact.load(path)
        return {"recipe": recipe.about.name, "ipc": recipe.data.ipc, "method": recipe.method,
                "objective": recipe.objective_name, "seed": recipe.run.seed,
                "steps": loaded.header["objective"].get("steps", recipe.objective.steps),
                "steps_of": recipe.objective.steps, **_stored(loaded)}

    return _measure(made.out, made.real, made.device, made.recipe.to_dict(), how, distil, describe, bars)


def measure_coreset(real: RealData, method: str, ipc: int, how: Evaluation, out: Path, *, seed: int = 0,
                    epochs: int = WHOLE.epochs, device: torch.device | str = "cpu",
                    bars: bool | None = None) -> dict[str, Any]:
    """`measure` for real images chosen by `method`, in the features of a network that was trained for `epochs` (see
    `speedk.distillation.coreset`)."""
    real = real.to(device)

    def choose() -> Path:
        path = out / runfiles.DISTILLED
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            rows = coreset.choose(real, method, ipc, seed=seed, epochs=epochs, device=device, progress=bars)
            coreset.save(path, real, rows, method, seed=seed, epochs=epochs)
        return path

    def describe(path: Path) -> dict[str, Any]:
        return {"recipe": "", "ipc": ipc, "method": "coreset", "objective": method, "seed": seed, "steps": 0,
                "steps_of": 0, **_stored(artifact.load(path))}

    what = {"coreset": method, "ipc": ipc, "seed": seed, "epochs": epochs}
    return _measure(out, real, device, what, how, choose, describe, bars)


def measure_whole(real: RealData, how: Evaluation, out: Path, *, device: torch.device | str = "cpu",
                  bars: bool | None = None) -> dict[str, Any]:
    """`measure` for the whole data set: the upper bound."""
    def source() -> sources.Source:
        out.mkdir(parents=True, exist_ok=True)
        return sources.whole(real)

    def describe(_: Any) -> dict[str, Any]:
        images = len(real.train)
        return {"recipe": "", "ipc": 0, "method": "whole", "objective": "", "seed": how.seed, "steps": 0, "steps_of": 0,
                "images_per_class": images // real.geometry.classes, "numbers": images * real.geometry.pixels,
                "budget": 0, "checksum": ""}

    return _measure(out, real, device, {"whole": True}, how, source, describe, bars)


def _measure(out: Path, real: RealData, device: torch.device | str, what: dict[str, Any], how: Evaluation,
             make: Callable[[], Any], describe: Callable[[Any], dict[str, Any]], bars: bool | None) -> dict[str, Any]:
    tests, key = how.tests(), _key(what, real)
    record = Record(out, key)
    if record.answers(tests.values()):
        return _line(record, how)
    # Whitened once and kept: the first run of a process would take longer than the others.
    real.normalised("train", torch.zeros(1, dtype=torch.int64))
    done, began = finished(out), time.monotonic()
    try:
        source = make()
    finally:  # an interrupted run goes on, and so does its clock
        spend(out, 0.0 if done else time.monotonic() - began)
    made = {"dataset": real.name, "split": real.split, "resolution": real.geometry.resolution, **describe(source),
            "distil_seconds": round(seconds(out), 1)}
    record.of(made)
    missing = [network for network, test in tests.items() if record.lacks(test)]
    if missing:
        report = evaluate(source, real, networks=missing, runs=how.runs, protocol=how.protocol, epochs=how.epochs,
                          seed=how.seed, standardisation=how.standardisation, precision=how.precision, device=device,
                          progress=bars).to_dict()
        facts = {"evaluate_seconds": report["seconds"], "device": report["device"], "protocol": report["protocol"],
                 "evaluation_seed": report["seed"], "version": speedk.__version__, "commit": _commit(),
                 "date": time.strftime("%Y-%m-%d", time.gmtime())}
        record = Record(out, key)  # meanwhile another process may have tested other networks
        record.of(made)
        for result in report["results"]:
            record.add(tests[result["network"]], {**result, "measured": facts})
        report["results"] = [record.result(test) for test in tests.values()]
        write_atomic(out / runfiles.EVALUATION, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    record.write()
    return _line(record, how)


def _line(record: Record, how: Evaluation) -> dict[str, Any]:
    """The set and the results of `how`; how they were measured is said of each, and of the latest for the whole."""
    results = [record.result(test) for test in how.tests().values()]
    latest = max((result["measured"] for result in results), key=lambda facts: facts["date"])
    return {**record.set, **latest, "results": results}


def _key(what: dict[str, Any], real: RealData) -> dict[str, Any]:
    """All that a set depends on."""
    return {"what": what, "data": real.fingerprint, "normaliser": real.normaliser.describe()}


def _stored(loaded: artifact.Distilled) -> dict[str, Any]:
    return {"images_per_class": len(loaded) // loaded.geometry.classes, "numbers": loaded.header["numbers"],
            "budget": loaded.header["budget"], "checksum": loaded.fingerprint}


def _commit() -> str:
    """The commit of the checkout that speedk runs from, or "" where it is installed."""
    root = Path(speedk.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip()
