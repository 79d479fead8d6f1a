"""Saved files for the commands to work on."""

from __future__ import annotations

import pytest
import torch
from making import header

from speedk.distillation import artifact
from speedk.distillation.parameterizations import pixels, speed
from speedk.geometry import Geometry


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def file(request, tmp_path):
    """Three classes of 8 px, two images each, of SPEED."""
    spec = speed.Spec(images_per_class=2, D=8, K=8, H=2, R=1, k=4, patch=4)
    made = speed.Speed(spec, Geometry(3, request.param, 8), 1)
    generator = torch.Generator().manual_seed(0)
    made.freenet.reset(generator)
    with torch.no_grad():
        made.saet.normal_(0, 0.2, generator=generator)
        made.scm.normal_(0, 0.2, generator=generator)
    made.finalize()
    path = tmp_path / "distilled.safetensors"
    artifact.save(path, made, header(["ant", "bee", "cat"], request.param))
    return path


@pytest.fixture
def save_pixels(tmp_path):
    """A function that saves pixels with the given class names, two images a class, and returns the path."""

    def save(names, normaliser=None, side=8):
        made = pixels.Pixels(pixels.Spec(init="noise"), Geometry(len(names), 3, side), 2)
        made.initialise(None, torch.Generator().manual_seed(0))
        path = tmp_path / "pixels.safetensors"
        artifact.save(path, made, header(names, 3, normaliser))
        return path

    return save
