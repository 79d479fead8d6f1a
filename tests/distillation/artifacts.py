"""Small distilled sets to save, read and damage."""

from __future__ import annotations

from pathlib import Path

import torch

from speedk.distillation import parameterizations
from speedk.distillation.parameterizations import pixels, speed
from speedk.geometry import Geometry

HEADER = {
    "recipe": {"recipe": {"name": "small"}, "objective": {"lr": 0.01, "rates": {"scm": 0.5}}},
    "class_names": ["cat", "großer hund", "vogel"],
    "normaliser": {"kind": "channel", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    "data": {"name": "toys", "split": "train/test", "note": "", "fingerprint": "0123456789abcdef"},
    "seed": 3,
    "protocol": "mtt",
    "objective": {"name": "dm", "lr": 0.01},
    "chosen": "asked for",
    "budget_off": True,
}


def make(method: str, seed: int = 0):
    """A finalized set of 3 classes, and its header."""
    generator = torch.Generator().manual_seed(seed)
    if method == "speed":
        made = speed.Speed(speed.Spec(images_per_class=3, D=8, K=8, H=2, R=2, k=4, patch=4), Geometry(3, 3, 8), 1)
        made.freenet.reset(generator)
        with torch.no_grad():
            made.saet.normal_(0, 0.2, generator=generator)
            made.scm.normal_(0, 0.2, generator=generator)
    elif method == "speed16":  # more than 256 tokens: 16-bit coordinates
        made = speed.Speed(speed.Spec(images_per_class=2, D=4, K=300, H=1, R=1, k=5, patch=4), Geometry(3, 1, 8), 1)
        made.freenet.reset(generator)
        with torch.no_grad():
            made.saet.normal_(0, 0.2, generator=generator)
            made.scm.normal_(0, 0.2, generator=generator)
    elif method == "pixels":
        made = pixels.Pixels(pixels.Spec(init="noise"), Geometry(3, 3, 8), 2)
        made.initialise(None, generator)
    else:
        tiny = plugin()
        made = tiny.Tiny(tiny.Spec(soft=True), Geometry(3, 1, 8), 1, [2, 1, 3])
    made.finalize()
    channels = made.geometry.channels
    normaliser = {"kind": "channel", "mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.25, 0.3][:channels]}
    return made, {**HEADER, "normaliser": normaliser}


def plugin():
    """The module of a parameterization that lives outside of the package, whose labels are learned."""
    folder = str(Path(__file__).parent / "plugins")
    if folder not in parameterizations.__path__:
        parameterizations.__path__.append(folder)
    from speedk.distillation.parameterizations import tiny

    return tiny


METHODS = ("speed", "speed16", "pixels", "tiny")
