"""Images and saved files for the commands to work on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from making import header
from PIL import Image

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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An image folder: three classes of 16 px, six training and two test images each."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (16, 16, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[parameterization]\nmethod = "speed"\nimages_per_class = 3\nD = 8\nK = 8\nH = 2\nR = 1\nk = 6\n'
                    'patch = 4\nfit_steps = 5\n[objective.dm]\nsteps = 2\nbatch = 4\n')
    return path
