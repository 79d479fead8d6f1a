"""How a synthetic set is matched to the real one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from speedk.errors import ConfigError, TrainingError
from speedk.precision import PRECISIONS

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.loop import Progress
    from speedk.distillation.parameterizations.base import Parameterization

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")

MAX_RATE = 1e9
"""Of any learning rate. The largest published is 1e5; with much more than this float32 overflows in a few steps."""

ABSURD = 1e4
"""A set with a learned number or an image's value beyond this, or not finite, is of no use: normalised images are of
deviation 1, and no method stores numbers of another order."""


@dataclass(frozen=True)
class ObjectiveSpec:
    """Recipe fields that every objective has.

    steps: outer iterations. optimizer: "sgd" or "adam", of the outer loop. momentum: of SGD. rates: the outer learning
    rate of each parameter group by its name, where it is not the group's own default. schedule: of these rates,
    "constant" or "cosine", from their full value to 0 over the steps. network: the student. precision: "float32" or
    "bf16", of the operands and results of its convolutions; all else is float32.
    """

    steps: int = 20000
    optimizer: str = "sgd"
    momentum: float = 0.5
    rates: dict[str, float] = field(default_factory=dict)
    schedule: str = "constant"
    network: str = "convnet"
    precision: str = "float32"

    LOCAL: ClassVar[tuple[str, ...]] = ()
    """Fields that name a place on this machine: no result depends on them, so the artifact leaves them out."""

    @classmethod
    def defaults(cls, protocol: str) -> dict[str, Any]:
        """Fields that are not at their defaults where evaluation goes by `protocol`, unless the recipe says them."""
        return {}

    def check(self) -> None:
        """Raise ConfigError where a field, or two together, cannot be."""
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps} must not be negative")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must be at least 0 and below 1")
        for name, rate in self.rates.items():
            if not 0 <= rate <= MAX_RATE:
                raise ConfigError(f"rates.{name}={rate:g} must be from 0 to {MAX_RATE:g}")

    def check_rates(self, *names: str) -> None:
        """Raise ConfigError unless the fields `names` can be learning rates."""
        for name in names:
            if not 0 < getattr(self, name) <= MAX_RATE:
                raise ConfigError(f"{name}={getattr(self, name):g} must be above 0 and at most {MAX_RATE:g}")

    def share(self, step: int) -> float:
        """What part of its rates the outer loop goes by in step 0, 1, ..., steps - 1."""
        return 1.0 if self.schedule == "constant" else 0.5 + 0.5 * math.cos(math.pi * step / max(1, self.steps))


class Skip(Exception):
    """Raised by `Objective.step` where an iteration gave nothing to learn from: the loop updates nothing, logs
    `numbers`, and goes on."""

    def __init__(self, numbers: dict[str, float]) -> None:
        super().__init__()
        self.numbers = numbers


class Diverged(TrainingError):
    """A run whose next steps would come to nothing: of the set or of the student nothing usable is left."""


def too_high(what: str, synthetic: Parameterization, spec: ObjectiveSpec) -> Diverged:
    """`what` happened to the set because of the outer rates: the error, which names the rate that is furthest above its
    default and a value to try."""
    rates = {group["name"]: (spec.rates.get(group["name"], group["lr"]), group["lr"])
             for group in synthetic.param_groups()}
    name = max(rates, key=lambda name: rates[name][0] / rates[name][1])
    rate, default = rates[name]
    lower = rate / 10 if rate <= 1e6 * default else default
    return Diverged(f"{what}: the outer rates are too high for this set (lower them, as in rates.{name}={lower:g}, now "
                    f"{rate:g})")


class Objective:
    """One matching objective.

    An objective is one file in this folder: a subclass, a frozen dataclass `Spec` of its recipe fields that extends
    `ObjectiveSpec`, and `PLUGIN = <the class>` at the end. All that is random in step t must come from
    `speedk.seeds` with the run's seed and t, so that a run that resumes at t draws what the uninterrupted
    run drew; whatever else lives from step to step goes in `state_dict`.
    """

    REQUIRED: ClassVar = ("name", "Spec", "step")
    """What every objective has of its own; for the rest there is a default."""

    Spec: ClassVar[type[ObjectiveSpec]] = ObjectiveSpec
    name: ClassVar[str]
    """The file's."""

    skips_where: ClassVar[str] = "there was nothing to learn from"
    then_lower: ClassVar[str] = "the outer rates"
    """For the user of a run with skipped iterations: what happened in them, and what to lower where it was in all."""

    failures: int = 0
    """Iterations skipped since the last one that was not."""

    skipped: int = 0
    """Iterations skipped in all."""

    def __init__(self, spec: Any, real: RealData, seed: int, device: torch.device) -> None:
        self.spec, self.real, self.seed, self.device = spec, real, seed, device

    @classmethod
    def outer(cls, method: str, ipc: int) -> dict[str, Any]:
        """Fields of `Spec` for the parameterization `method` at `ipc` images per class, where no recipe says them: they
        come before the method's own, `Parameterization.OUTER`."""
        return {}

    def preparation(self) -> tuple[str, float]:
        """What `prepare` will find and make, in words ("" for nothing), and the seconds that will take."""
        return "", 0.0

    def prepare(self, progress: Progress | None = None) -> None:
        """Make what the steps need and is not made yet (experts). May take hours, be interrupted, and called again."""

    def pretend(self) -> None:
        """Go on with stand-ins for what `prepare` would make, so that a step can be timed without it."""

    def check_student(self) -> None:
        """Raise ConfigError where the recipe's network cannot be the student: asked before a run leaves anything
        behind."""

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        """One outer iteration: add the gradients of the matching loss to the parameters of `synthetic` (through
        `synthetic.accumulate`) and to `learned()`, without touching the optimiser.

        Returns the numbers to log, "loss" among them. Raises Skip (with `failures` and `skipped` counted up), Diverged.
        """
        raise NotImplementedError

    def learned(self) -> list[dict[str, Any]]:
        """Optimiser groups of the objective's own (the synthetic learning rate of trajectory matching)."""
        return []

    def after_update(self) -> None:
        """Called after each optimiser step: clip what must stay in a range."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings that the next step depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def artifact_fields(self) -> dict[str, float | str]:
        """What evaluation needs from the objective, stored in the artifact ("lr": the rate to train at)."""
        return {}
