"""What is learned: one file a method."""

from speedk.distillation.parameterizations.base import Parameterization

INTERFACE = Parameterization
