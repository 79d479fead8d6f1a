"""Coresets: ways to choose real images instead of learning synthetic ones, one file a method."""

from speedk.distillation.coresets.base import Coreset

INTERFACE = Coreset
