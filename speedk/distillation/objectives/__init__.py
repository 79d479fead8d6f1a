"""How a synthetic set is matched to the real one: one file an objective."""

from speedk.distillation.objectives.base import Objective

INTERFACE = Objective
