"""The data set of these tests, and a distilled file of it."""

from __future__ import annotations

import pytest
import torch
from stripes import make_real

from speedk.data.real import RealData
from speedk.distillation import artifact
from speedk.distillation.parameterizations.pixels import Pixels, Spec


@pytest.fixture(scope="session")
def real() -> RealData:
    return make_real()


@pytest.fixture
def write_artifact(tmp_path):
    """A function that writes pixels as a distilled file of some data."""
    def write(real: RealData, lr: float = 0.02, protocol: str = "mtt", name: str = "distilled.safetensors"):
        synthetic = Pixels(Spec(), real.geometry, 2)
        synthetic.initialise(real, torch.Generator().manual_seed(0))
        header = {"recipe": {}, "class_names": list(real.class_names), "normaliser": real.normaliser.describe(),
                  "data": real.describe(), "seed": 0, "protocol": protocol, "objective": {"name": "dm", "lr": lr},
                  "chosen": "", "budget_off": False}
        artifact.save(tmp_path / name, synthetic, header)
        return tmp_path / name
    return write
