"""Gradient matching with siamese augmentation (Zhao and Bilen, ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from speedk.distillation.objectives import dc


@dataclass(frozen=True)
class Spec(dc.Spec):
    """The fields of gradient matching, augmented by default."""

    augment: bool = True


class SiameseGradientMatching(dc.GradientMatching):
    """Gradient matching where, for each class, the real and the synthetic images get one and the same augmentation with
    the same parameters, and the student is trained on augmented images."""

    Spec = Spec
    name = "dsa"


PLUGIN = SiameseGradientMatching
