"""The loop: one for every parameterization and every objective, resumable at any step to the same bits."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speedk import registry, seeds
from speedk.data import RealData
from speedk.distillation import artifact, checkpoint, objectives, parameterizations, runfiles, signals
from speedk.distillation.objectives.base import ABSURD, Diverged, Objective, Skip, too_high
from speedk.distillation.parameterizations.base import Parameterization
from speedk.distillation.recipe import Recipe
from speedk.distillation.rundir import RunDir, holds_a_run
from speedk.errors import ConfigError, Interrupted, TrainingError, one_line
from speedk.training import repeatable

CHECKPOINT_SECONDS, QUICK = 30.0, 1.5
"""How long after a checkpoint the next is saved, and how long saving one may take for that: where it takes longer the
next waits longer, so that no more than a twentieth of the time goes into saving."""
LOOKED_AT = 32
"""Decoded images that are looked at before a checkpoint is saved, evenly spread."""


class OutOfTime(Interrupted):
    """The minutes of the run were over before its first step."""


@dataclass(frozen=True)
class Progress:
    """What the loop tells whoever watches, as (done, total, numbers): experts: after each of their epochs; fit: after
    each step of the fit of the start; step: after each outer iteration. say: a line worth reading."""

    experts: Callable[[int, int, dict[str, float]], None] = lambda *_: None
    fit: Callable[[int, int, dict[str, float]], None] = lambda *_: None
    step: Callable[[int, int, dict[str, float]], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None


class Run:
    """A synthetic set, its objective and its optimiser: the state that a checkpoint holds."""

    def __init__(self, recipe: Recipe, real: RealData, device: torch.device) -> None:
        self.recipe, self.real, self.device = recipe, real.to(device), device
        method = registry.find(parameterizations, recipe.method)
        objective = registry.find(objectives, recipe.objective_name)
        recipe.budget(real.geometry)
        self.synthetic: Parameterization = method(recipe.parameterization, real.geometry, recipe.data.ipc).to(device)
        self.objective: Objective = objective(recipe.objective, self.real, recipe.run.seed, device)
        self.optimizer = _optimizer(recipe, [*self.synthetic.param_groups(), *self.objective.learned()])
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.done = 0

    def initialise(self, progress: Progress) -> None:
        """Step 0: the starting values of the synthetic set."""
        self.synthetic.initialise(self.real, seeds.generator(self.recipe.run.seed, "initialise"), progress.fit)

    def advance(self) -> dict[str, float]:
        """One outer iteration. Raises Diverged, before anything is updated, where the loss is not finite."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.recipe.objective.share(self.done)
        self.optimizer.zero_grad()  # and free what they take: a step of the objective needs room of its own
        try:
            numbers = self.objective.step(self.synthetic, self.done)
        except Skip as skipped:
            self.done += 1
            return skipped.numbers
        penalty = self.synthetic.accumulate_penalty()
        if penalty is not None:
            numbers["penalty"] = penalty
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise too_high(f"the {name} is {value} at step {self.done + 1}", self.synthetic, self.recipe.objective)
        self.optimizer.step()
        self.objective.after_update()
        self.done += 1
        return numbers

    @torch.no_grad()
    def check(self) -> None:
        """Raise Diverged where the set, as it is, is of no use to anyone."""
        if 0 < self.objective.skipped == self.done:
            raise Diverged(f"{self.objective.skips_where} in all {self.done:,} iterations, so nothing was learned: "
                           f"lower {self.objective.then_lower}")
        index = torch.linspace(0, self.synthetic.size - 1, min(LOOKED_AT, self.synthetic.size)).long()
        images = self.synthetic.decode(index.to(self.device))[0]
        for name, tensor in (*self.synthetic.named_parameters(), ("the synthetic images", images)):
            largest = float(torch.linalg.vector_norm(tensor, torch.inf)) if tensor.numel() else 0.0  # makes no copy
            if not largest <= ABSURD:  # or nan
                raise too_high(f"there is a value of {largest:.3g} in {name} after step {self.done:,}", self.synthetic,
                               self.recipe.objective)

    def state(self) -> dict[str, Any]:
        return {"synthetic": dict(self.synthetic.state_dict()), "optimizer": self.optimizer.state_dict(),
                "objective": self.objective.state_dict()}

    def restore(self, done: int, state: dict[str, Any]) -> None:
        self.synthetic.load_state_dict(state["synthetic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.done = done

    def header(self, chosen: str) -> dict[str, Any]:
        """What the artifact says of its making."""
        recipe = self.recipe
        return {
            "recipe": recipe.portable(),
            "class_names": list(self.real.class_names),
            "normaliser": self.real.normaliser.describe(),
            "data": self.real.describe(),
            "seed": recipe.run.seed,
            "protocol": recipe.run.protocol,
            "objective": {"name": recipe.objective_name, **self.objective.artifact_fields(),
                          **({"steps": self.done} if self.done < recipe.objective.steps else {})},
            "chosen": chosen,
            "budget_off": recipe.data.budget == "off",
        }


def distill(recipe: Recipe, real: RealData, out: str | Path, *, resume: bool = False,
            device: str | torch.device = "cpu", chosen: str = "", progress: Progress | None = None,
            minutes: float | None = None) -> Path:
    """Distil `real` as `recipe` says into the run directory `out`; return the path of the artifact.

    With `resume` a run that was stopped at any instant goes on, and on the CPU, with as many threads, ends in the bytes
    of a run that was never stopped. chosen: why this objective, for the artifact's header; a run that goes on keeps
    what it was begun with. minutes: after so long, but not within the fit of the start, the file is written as the set
    then is, and its header says after how many steps; the run can be resumed. Where experts take longer than that,
    OutOfTime is raised and they are kept.
    Raises ConfigError (a recipe that cannot be run, a directory in use), TrainingError (a loss that is not finite, no
    space), and Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    progress = progress or Progress()
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    run = Run(recipe, real, torch.device(device))
    if not holds_a_run(Path(out)):
        run.objective.check_student()
    with signals.noted() as stop, repeatable(run.device), RunDir(out, recipe, real, resume, chosen) as folder:
        try:
            resumed = _restore(run, folder)
            _prepare(run, _hurried(progress, until))
            if resumed:
                progress.say(f"resuming at step {run.done:,} of {recipe.objective.steps:,}")
            else:
                run.initialise(progress)
                checkpoint.save(folder.checkpoints, 0, run.state())
        except KeyboardInterrupt:
            raise Interrupted(f"stopped before step {run.done + 1:,}") from None
        with folder.log(run.done) as log:
            _iterate(run, folder, log, stop, progress, until)
        return _finish(run, folder, progress)


def _prepare(run: Run, progress: Progress) -> None:
    try:
        run.objective.prepare(progress)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped before step {run.done + 1:,}: finished epochs of experts are kept") from None


def _restore(run: Run, folder: RunDir) -> bool:
    """Go back to the newest checkpoint, if there is one."""
    found = checkpoint.load_newest(folder.checkpoints, run.device)
    if found is None:
        return False
    done, state = found
    steps = run.recipe.objective.steps
    if done > steps:
        raise ConfigError(f"{folder.path} is at step {done:,} already: steps={steps} cannot be had from it; say {done} "
                          "or more, or choose another --out")
    try:
        run.restore(done, state)
    except ConfigError:  # a ValueError too, which says what to do
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"the checkpoint of step {done:,} in {folder.checkpoints} is not of this recipe "
                            f"({one_line(error)}); start anew in another --out") from None
    return True


def _hurried(progress: Progress, until: float) -> Progress:
    def experts(done: int, total: int, numbers: dict[str, float]) -> None:
        progress.experts(done, total, numbers)
        if done < total and time.monotonic() > until:
            raise OutOfTime(f"the minutes were over after {done:,} of {total:,} epochs of experts, which are kept")

    return dataclasses.replace(progress, experts=experts)


def _iterate(run: Run, folder: RunDir, log, stop: signals.Stop, progress: Progress, until: float) -> None:
    steps, every = run.recipe.objective.steps, run.recipe.run.preview_every
    saved, saved_at, wait = run.done, time.monotonic(), CHECKPOINT_SECONDS
    stop.patient = True
    while run.done < steps:
        late = False
        try:
            numbers = run.advance()
            log.write(run.done, numbers)
            progress.step(run.done, steps, numbers)
            if every and run.done % every == 0:
                folder.preview(run.synthetic, run.real)
            late = time.monotonic() > until
            due = stop.asked or time.monotonic() - saved_at > wait
            # While iterations fail the checkpoint from before stays the newest: from there the run comes here again.
            if late or run.done == steps or (due and not run.objective.failures):
                began = time.monotonic()
                run.check()
                log.flush()
                checkpoint.save(folder.checkpoints, run.done, run.state())
                saved, saved_at = run.done, time.monotonic()
                wait = CHECKPOINT_SECONDS * max(1.0, (saved_at - began) / QUICK)
        except Diverged as error:
            if saved >= run.done - max(0, run.objective.failures - 1):  # not one good step was made from there
                saved = checkpoint.drop_newest(folder.checkpoints)
            raise TrainingError(f"{error}; {folder.last_good(saved)}") from None
        if stop.asked and run.done < steps:
            kept = "all of it saved" if saved == run.done else f"saved as of step {saved:,}, as it diverges since,"
            raise Interrupted(f"stopped at step {run.done:,} of {steps:,}, {kept} in {folder.path}")
        if late:
            break


def _finish(run: Run, folder: RunDir, progress: Progress) -> Path:
    if run.objective.skipped:
        progress.say(f"skipped {run.objective.skipped:,} of {run.done:,} iterations, in which "
                     f"{run.objective.skips_where}; {folder.path / runfiles.LOG} has which")
    run.synthetic.finalize()
    folder.preview(run.synthetic, run.real)
    artifact.save(folder.artifact, run.synthetic, run.header(folder.chosen))
    return folder.artifact


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    spec = recipe.objective
    names = [group["name"] for group in groups]
    for name in spec.rates:
        if name not in names:
            raise ConfigError(f"rates.{name}: there is no parameter group {name!r}, only {', '.join(names)}"
                              f"{registry.nearest(name, names)}")
    for group in groups:
        group["lr"] = spec.rates.get(group["name"], group["lr"])
    if spec.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)  # in one pass over memory, and with no copy of a parameter
    return torch.optim.SGD(groups, lr=0.0, momentum=spec.momentum)
