"""Distribution matching against a step that is written out, in float64."""

import math

import pytest
import torch
from toys import given_draws, make_real

from speedk import networks, seeds
from speedk.augment import dsa
from speedk.data import RealData
from speedk.distillation import loop
from speedk.distillation.recipe import resolve


@pytest.mark.parametrize(("network", "resolution", "ipc", "batch", "augment"), [
    ("convnet", 8, 2, 5, True), ("convnet", 8, 2, 5, False),  # a batch that is a part of its class, three at once
    ("convnet", 8, 3, 2048, True),  # a batch that is all of its class, two at once
    ("mlp", 128, 9, 5, True),  # two images a piece, and more pieces than have their graph held
], ids=["a part", "a part as it is", "whole classes", "walked twice"])
def test_a_step_is_the_written_out_one(network, resolution, ipc, batch, augment, monkeypatch):
    """A class's images alone on both sides, with one draw for both."""
    drawn, sample, seen = given_draws(monkeypatch, resolution), RealData.sample, {}

    def kept(self, label, *how):
        assert label not in seen
        seen[label] = sample(self, label, *how)
        return seen[label]

    tables = {"data": {"ipc": ipc}, "parameterization": {"method": "pixels"},
              "objective": {"dm": {"batch": batch, "augment": augment, "network": network}}}
    real = make_real(resolution=resolution)
    run = loop.Run(resolve(tables, "dm"), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    monkeypatch.setattr(RealData, "sample", kept)
    loss = run.objective.step(run.synthetic, 3)["loss"]

    student = networks.student(network, real.geometry, seeds.derive(0, "student", 3)).double()
    synthetic = run.synthetic.images.detach().double().requires_grad_()
    assert len(drawn) == (3 if augment else 0)
    expected = 0
    for label in range(3):
        whole = real.normalised("train", real.train.labels == label)
        found = (seen[label][:, None] == whole).flatten(2).all(2)
        assert found.sum() == found.any(0).sum() == min(batch, 12)  # images of the class, none twice
        both = [seen[label].double(), synthetic[run.synthetic.classes == label]]
        if augment:
            both = [dsa.apply(images, drawn[label]) for images in both]
        of_real, of_set = (student.features(images).sum(dim=0) / len(images) for images in both)
        expected = expected + ((of_real - of_set) ** 2).sum()
    slope, = torch.autograd.grad(expected, synthetic)
    assert math.isclose(loss, float(expected.detach()), rel_tol=1e-4)
    torch.testing.assert_close(run.synthetic.images.grad.double(), slope, rtol=1e-2,
                               atol=1e-3 * float(slope.abs().max()))
