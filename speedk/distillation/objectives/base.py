"""How a synthetic set is matched to the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.parameterizations.base import Parameterization


class Objective:
    """One matching objective. An objective is one file in this folder: a subclass, a frozen dataclass `Spec` of its
    recipe fields, and `PLUGIN = <the class>` at the end.

    All that is random in step t must come from `speedk.distillation.seeds.generator(seed, t, ...)`, so that a run that
    resumes at t draws what the uninterrupted run drew; whatever else lives from step to step goes in `state_dict`.
    """

    Spec: ClassVar[type]
    name: ClassVar[str]

    def __init__(self, spec: Any, recipe: Any, real: RealData, device: Any) -> None:
        self.spec, self.recipe, self.real, self.device = spec, recipe, real, device

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        """One outer iteration: add the gradients of the matching loss to the parameters of `synthetic` and to
        `learned()`, without touching the optimiser; return the numbers to log ("loss" among them)."""
        raise NotImplementedError

    def learned(self) -> list[dict[str, Any]]:
        """Optimiser groups of the objective's own (the synthetic learning rate of trajectory matching)."""
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Networks that live across steps, for the checkpoint."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def artifact_fields(self) -> dict[str, float]:
        """What evaluation needs from the objective, stored in the artifact ("lr": the rate to train at)."""
        return {}
