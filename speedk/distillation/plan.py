"""From what a user asks for to a run: recipe, real data, device, objective and where the results go."""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speedk import data, networks, registry
from speedk.data import RealData
from speedk.distillation import loop, objectives, parameterizations, runfiles
from speedk.distillation import recipe as recipes
from speedk.distillation.loop import Progress, Run
from speedk.distillation.objectives import tm
from speedk.distillation.recipe import Recipe
from speedk.distillation.rundir import begun_with
from speedk.errors import ConfigError

PAPER_OBJECTIVE = "tm"
ESTIMATE_STEPS = 3
"""Outer steps that `estimate` measures."""


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start. chosen: the objective and why; notes: what was decided on the way, for the user."""

    recipe: Recipe
    real: RealData
    device: torch.device
    out: Path
    chosen: str
    notes: tuple[str, ...]

    def run(self, *, resume: bool = False, progress: Progress | None = None, minutes: float | None = None) -> Path:
        """Distil; returns the path of the artifact. See `speedk.distillation.loop.distill`."""
        return loop.distill(self.recipe, self.real, self.out, resume=resume, device=self.device, chosen=self.chosen,
                            progress=progress, minutes=minutes)


def distill(dataset: str | None = None, *, data: str | Path | None = None, ipc: int | None = None,
            method: str | None = None, objective: str = "auto", recipe: str | Path | None = None,
            out: str | Path | None = None, seed: int | None = None, device: str = "auto", steps: int | None = None,
            resume: bool = False, minutes: float | None = None, progress: Progress | None = None,
            **fields: Any) -> Path:
    """Distil a data set into one file, and return its path.

    dataset: a name of `speedk.data` ("digits", "cifar10", ...; the embedded digits where neither it nor `data` is
    given); data: a folder with images, alone or as the place of `dataset`. ipc: images per class whose storage the
    file may take (default: 1). method: a file of `speedk.distillation.parameterizations` (default: "speed"); objective:
    one of `speedk.distillation.objectives`, or "auto": the paper's, "tm", on a GPU and "dm" elsewhere. recipe: the name
    of a shipped recipe or a TOML file; without it the recipe of that row is taken, or one is made within the budget.
    seed: of everything random; steps: outer iterations (default: the recipe's). Any other recipe field can be
    given by its name (k=24, rates={"scm": 0.01}). out: the run directory (default: one under runs/). device: "cpu",
    "cuda", or "auto", a GPU where there is one. With `resume` the run in `out` goes on, or begins. minutes: stop after
    so long, with the file written as the set then is. progress: what is called as the run goes on.

    Raises ConfigError for what cannot be run, DataError for data that cannot be read, and TrainingError for a run that
    diverged or could not write (all of them speedk.errors.SpeedkError); speedk.errors.Interrupted where Ctrl-C or
    SIGTERM stopped it, or the minutes were over before the first step: what it had is saved.
    """
    made = plan(dataset, data=data, ipc=ipc, method=method, objective=objective, recipe=recipe, out=out, seed=seed,
                device=device, steps=steps, overrides=fields, resume=resume)
    return made.run(resume=resume, progress=progress, minutes=minutes)


def plan(dataset: str | None = None, *, data: str | Path | None = None, ipc: int | None = None,
         method: str | None = None, objective: str = "auto", recipe: str | Path | None = None,
         out: str | Path | None = None, seed: int | None = None, device: str = "auto", steps: int | None = None,
         network: str | None = None, overrides: dict[str, Any] | None = None, resume: bool = False,
         progress: bool = False, load: Callable[..., RealData] | None = None) -> Plan:
    """What `distill` will do, without doing it. Arguments as for `distill`; network: the student; progress: bars while
    data are read; load: what reads them, in place of `speedk.data.load` (to keep them from one plan to the next)."""
    where = chosen_device(device)
    if ipc is not None and ipc < 1:
        raise ConfigError(f"ipc={ipc} must be at least 1")
    changes = _changes(overrides or {}, {"data.ipc": ipc, "run.seed": seed, "objective.steps": steps,
                                         "objective.network": network})
    stored = Path(out) / runfiles.RECIPE if out is not None else None
    if resume and recipe is None and stored is not None and stored.is_file():
        return _resumed(recipes.read(stored), dataset, data, method, objective, changes, where, Path(out), progress)
    notes: list[str] = []
    tables = _tables(dataset, data, ipc, method, recipe)
    if dataset is not None and tables.get("data", {}).get("name", dataset) not in ("", dataset):
        raise ConfigError(f"the recipe is for {tables['data']['name']}, not {dataset}")
    chosen, why = choose(objective, where)
    named = tables.get("data", {}).get("name") or dataset
    draft = _data_fields(tables, changes)
    real = _load(named, data, draft, progress, load)
    if "parameterization" not in tables:
        tables = _own(tables, real, method or "speed", draft.ipc, notes)
    tables = _settled(tables, chosen, draft.ipc)
    resolved = recipes.resolve(tables, chosen, changes)
    resolved = dataclasses.replace(resolved, data=dataclasses.replace(resolved.data, name=named or ""))
    resolved.budget(real.geometry)
    networks.given(resolved.objective.network)
    folder = Path(out) if out is not None else Path("runs") / f"{_run_name(resolved, real)}-seed{resolved.run.seed}"
    if resume and out is None and (folder / runfiles.RECIPE).is_file():
        return _resumed(recipes.read(folder / runfiles.RECIPE), dataset, data, method, objective, changes, where,
                        folder, progress)
    if resume:
        why = begun_with(folder) or why
    return Plan(resolved, real, where, folder, why, tuple(notes))


def choose(objective: str, device: torch.device) -> tuple[str, str]:
    """The objective that "auto" means on `device`, and a sentence on why."""
    if objective != "auto":
        registry.find(objectives, objective)
        return objective, f"{objective}, as asked"
    if device.type != "cuda":
        return "dm", "dm: without a GPU trajectory matching (tm), the paper's objective, takes too long"
    return PAPER_OBJECTIVE, "tm: the paper's objective, and there is a GPU"


def chosen_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" asks for. Raises ConfigError for one that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no GPU here; say cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _tables(dataset: str | None, folder: str | Path | None, ipc: int | None, method: str | None,
            recipe: str | Path | None) -> dict[str, Any]:
    """The recipe that was asked for, or of the row that was asked for; without a parameterization where none is."""
    if recipe is not None:
        tables = recipes.read(recipe)
        fields = dict(tables.get("objective", {}))
        if isinstance(name := fields.pop("name", None), str):  # a run's recipe.toml, which knows one objective only
            tables["objective"] = {name: fields}
        stated = tables.get("parameterization", {}).get("method")
        if method is not None and method != stated:
            raise ConfigError(f"the recipe {recipe} is for the method {stated!r}, not {method!r}")
        return tables
    if dataset is None and folder is None:
        dataset = "digits"
    if method is not None:
        registry.find(parameterizations, method)
    if dataset is not None:
        data.catalogue.entry(dataset)
        name = recipes.find_row(dataset, ipc or 1, method or "speed")
        if name is not None:
            return recipes.read(name)
    return {"data": {"name": dataset or "", "ipc": ipc or 1}}


def _data_fields(tables: dict[str, Any], changes: dict[str, Any]) -> recipes.DataFields:
    """The data table as it will be resolved: what must be known before the data are read."""
    names = {f.name for f in dataclasses.fields(recipes.DataFields)}
    values = dict(tables.get("data", {}))
    for key, value in changes.items():
        table, _, field = key.rpartition(".")
        if table in ("", "data") and field in names:
            values[field] = value
    return recipes.build(recipes.DataFields, values, "data")


def _changes(overrides: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What differs from the recipe: `overrides`, and the options that are given. Raises ConfigError where two of
    these do not agree."""
    for key in {"name", "data.name"} & set(overrides):
        raise ConfigError(f"{key}={overrides[key]} is said as --dataset {overrides[key]} (in Python as the first "
                          "argument)")
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in (overrides | given).items():
        bare = "" if key.startswith("rates.") else key.partition(".")[2]  # rates.synthetic_lr is not where it starts
        for same in {key, bare} & set(overrides):
            if repr(overrides[same]) != repr(value):  # nan is not nan
                said = f"--{bare} {value}" if key in given else f"{key}={value}"
                raise ConfigError(f"{said} and {same}={overrides[same]} do not agree: leave one of them out")
    return overrides | given


def _load(name: str | None, folder: str | Path | None, fields: recipes.DataFields, progress: bool,
          load: Callable[..., RealData] | None = None) -> RealData:
    real = (load or data.load)(name or None, folder, resolution=fields.resolution or None, split=fields.split or None,
                               normaliser=fields.normaliser or None, progress=progress)
    return real.only(data.listed(fields.classes)) if fields.classes else real


def _own(tables: dict[str, Any], real: RealData, method: str, ipc: int, notes: list[str]) -> dict[str, Any]:
    """A recipe where none is published: the method's defaults, or sizes that it solves for."""
    sizes = registry.find(parameterizations, method).sizes(real.geometry, ipc)
    if sizes:
        notes.append("no recipe is shipped for this row: its sizes were solved for within the budget")
    about = {"name": f"{real.name}-ipc{ipc}-{method}", "row": "ours, solved for" if sizes else "ours"}
    return {"recipe": about, "parameterization": {"method": method, **sizes}, **tables}


def _settled(tables: dict[str, Any], objective: str, ipc: int) -> dict[str, Any]:
    """The recipe with outer settings for `objective` where it says none. How trajectories are matched is then as in the
    recipe that is shipped for SPEED in the same row, so that two methods are compared at the same cost."""
    said, about = tables.get("objective", {}), tables.get("data", {})
    method = tables["parameterization"].get("method")
    if objective in said or method not in registry.names(parameterizations):
        return tables
    row = recipes.find_row(about.get("name"), ipc, "speed") if objective == PAPER_OBJECTIVE else None
    shared = recipes.read(row)["objective"].get(objective, {}) if row is not None else {}
    shared = {key: value for key, value in shared.items() if key not in ("optimizer", "momentum", "rates")}
    own = registry.find(parameterizations, method).OUTER | registry.find(objectives, objective).outer(method, ipc)
    return {**tables, "objective": {**said, objective: shared | own}}


def _run_name(recipe: Recipe, real: RealData) -> str:
    classes = re.sub(r"[^\w,-]+", "_", f"-{recipe.data.classes}")[:100] if recipe.data.classes else ""
    return f"{real.name}{classes}-ipc{recipe.data.ipc}-{recipe.method}-{recipe.objective_name}"


def _resumed(tables: dict[str, Any], dataset: str | None, folder: str | Path | None, method: str | None,
             objective: str, changes: dict[str, Any], device: torch.device, out: Path, progress: bool) -> Plan:
    """The plan of a run directory; what is said again must agree with it."""
    stored = recipes.from_resolved(tables)
    said = {"data.name": dataset, "parameterization.method": method,
            "objective.name": None if objective == "auto" else objective}
    have = {"data.name": stored.data.name, "parameterization.method": stored.method,
            "objective.name": stored.objective_name}
    for name, value in said.items():
        if value is not None and value != have[name]:
            raise ConfigError(f"{out} holds a run with {name}={have[name]!r}, not {value!r}; choose another --out")
    name = stored.objective_name
    inner = {key: value for key, value in tables["objective"].items() if key != "name"}
    resolved = recipes.resolve({**tables, "objective": {name: inner}}, name, changes)
    if ":" not in resolved.objective.network or {"network", "objective.network"} & set(changes):
        networks.given(resolved.objective.network)  # a run directory may have come from elsewhere
    real = _load(stored.data.name, folder, resolved.data, progress)
    return Plan(resolved, real, device, out, begun_with(out) or choose(name, device)[1], ())


class _Enough(Exception):
    pass


@dataclass(frozen=True)
class Estimate:
    """Measured over a few steps: seconds of a step and of the start, peak memory in bytes."""

    step_seconds: float
    start_seconds: float
    peak_bytes: int

    def seconds(self, steps: int) -> float:
        return self.start_seconds + steps * self.step_seconds


def estimate(made: Plan) -> Estimate:
    """Run the start of `made` for a moment and a few outer iterations, and throw them away."""
    if made.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(made.recipe, made.real, made.device)
    run.objective.pretend()
    run.rates = [0.0] * len(run.rates)  # what is learned from a stand-in is not to be followed
    seen: list[tuple[float, int, int]] = []

    def watch(done: int, total: int, numbers: dict[str, float]) -> None:
        seen.append((time.perf_counter(), done, total))
        if len(seen) > 8 or seen[-1][0] - seen[0][0] > 10:
            raise _Enough

    began = time.perf_counter()
    try:
        run.initialise(Progress(fit=watch))
        start = time.perf_counter() - began
    except _Enough:
        (first, done, total), (last, reached, _) = seen[0], seen[-1]
        start = first - began + (last - first) / max(1, reached - done) * total
    times = []
    for _ in range(ESTIMATE_STEPS + 1):
        began = time.perf_counter()
        skipped = "loss" not in run.advance()
        times.append((skipped, time.perf_counter() - began))  # one that is skipped is cheap, and counts for nothing
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if made.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return Estimate(min(times[1:])[1], start, peak)


def preparation(made: Plan) -> tuple[str, float]:
    """What the objective needs before its first step (experts), in words, and about how many seconds that takes."""
    objective = registry.find(objectives, made.recipe.objective_name)
    return objective(made.recipe.objective, made.real, made.recipe.run.seed, made.device).preparation()


def trajectory_seconds(made: Plan, tables: dict[str, Any] | None = None) -> tuple[float, float]:
    """About what trajectory matching would cost `made` with the settings of the recipe `tables`: seconds of one
    iteration, and of all with the experts."""
    fields = (tables or {}).get("objective", {}).get(PAPER_OBJECTIVE, {})
    spec = recipes.build(tm.Spec, fields | {"network": made.recipe.objective.network}, PAPER_OBJECTIVE)
    return tm.seconds(spec, made.real, made.device)
