"""Gradient matching against a reference that is written out, in float64; its loops, and its resumption."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from toys import given_draws, make_real

from speedk import networks
from speedk.augment import dsa
from speedk.distillation import loop
from speedk.distillation.objectives import dc, dm
from speedk.distillation.recipe import resolve
from speedk.errors import ConfigError
from speedk.geometry import Geometry

TABLES = {"data": {"ipc": 2}, "parameterization": {"method": "pixels"},
          "objective": {name: {"steps": 6, "batch": 8, "outer": 3, "inner": 2, "inner_batch": 4,
                               "rates": {"pixels": 0.1}} for name in ("dc", "dsa")}}


def written_out(network, weights, real, synthetic, label):
    """sum over layers and rows of 1 - cosine, a row at a time, biases and norms left out."""
    labels = torch.full((len(real),), label), torch.full((len(synthetic),), label)
    of_real = torch.autograd.grad(F.cross_entropy(network(real), labels[0]), weights)
    of_set = torch.autograd.grad(F.cross_entropy(network(synthetic), labels[1]), weights, create_graph=True)
    total = 0
    for a, b in zip(of_real, of_set):
        if a.ndim == 1:
            continue
        for row in range(len(a)):
            u, v = a[row].reshape(-1), b[row].reshape(-1)
            alike = 0  # of a unit that is dead in one of the two
            if u.any() and v.any():
                alike = torch.dot(u, v) / ((u * u).sum().sqrt() * (v * v).sum().sqrt() + 1e-6)
            total = total + 1 - alike
    return total


def make_student(name, **options):
    network = networks.fresh(name, Geometry(3, 3, 16), 5, **options).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return network


@pytest.mark.parametrize("piece", [8, 2, 1], ids=["one piece", "four pieces", "walked twice"])
@pytest.mark.parametrize(("name", "options"), [("convnet", {"depth": 2, "width": 6}), ("mlp", {"width": 8}),
                                               ("vit", {"dim": 8, "depth": 1, "heads": 1, "hidden": 8})])
def test_the_match_and_its_gradient(name, options, piece):
    network = make_student(name, **options)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
    images = torch.randn(7, 3, 16, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    draw = dsa.Draw("scale", 16, {"x": torch.tensor([1.1]), "y": torch.tensor([0.9])})
    with networks.twice_differentiable():
        weights = [p for p in network.parameters() if p.ndim > 1]
        expected = written_out(network, weights, dsa.apply(real, draw), dsa.apply(images, draw), 1)
        slope, = torch.autograd.grad(expected, images)
        target = [g / len(real) for g in dc._summed(network, weights, real, 1, draw, piece)]
        got, gradient = dc.match(network, images.detach(), 1, target, draw, piece)
    assert math.isclose(float(got), float(expected.detach()), rel_tol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)
    assert float(slope.abs().max()) > 1e-4


@pytest.mark.parametrize("piece", [8, 2, 1], ids=["one piece", "four pieces", "walked twice"])
def test_the_distance_of_embeddings_and_its_gradient(piece):
    network = make_student("convnet", depth=2, width=6)
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.linspace(-1, 1, network.features(images).shape[1], dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    expected = (network.features(leaf).mean(dim=0) - target).square().sum()
    slope, = torch.autograd.grad(expected, leaf)
    got, gradient = dm._distance(network, images, target, None, piece)
    assert math.isclose(float(got), float(expected.detach()), rel_tol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dc", "dsa"])
def test_a_step_is_the_written_out_one(name, monkeypatch):
    """The first step, with a fresh student, and the second, before which it trains on the set: own classes on both
    sides, with one draw for both."""
    drawn = given_draws(monkeypatch, 8)
    real = make_real(resolution=8)
    # All images of a class, real or synthetic, are one batch: their order does not matter.
    run = loop.Run(resolve(TABLES, name, {"objective.batch": 12, "inner_batch": 6}), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    own, images = run.synthetic.classes, run.synthetic.images
    for step, epochs in enumerate((0, 2)):
        student = run.objective._fresh(0).double()
        synthetic = images.detach().double().requires_grad_()
        images.grad = None
        loss = run.objective.step(run.synthetic, step)["loss"]
        of_step = drawn[:] if name == "dsa" else [None] * 5
        seen = dsa.apply if name == "dsa" else lambda found, _: found
        assert len(drawn) == (epochs + 3 if name == "dsa" else 0)
        drawn.clear()
        with networks.twice_differentiable():
            for of_epoch in of_step[:epochs]:
                optimizer = torch.optim.SGD(student.parameters(), 0.01)
                optimizer.zero_grad()
                F.cross_entropy(student(seen(synthetic.detach(), of_epoch)), own).backward()
                optimizer.step()
            for got, want in zip(run.objective._student.parameters(), student.parameters(), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
            student = copy.deepcopy(run.objective._student).double()
            expected = sum(written_out(student, list(student.parameters()),
                                       seen(real.normalised("train", real.train.labels == label).double(), of_class),
                                       seen(synthetic[own == label], of_class), label)
                           for label, of_class in enumerate(of_step[epochs:epochs + 3]))
            slope, = torch.autograd.grad(expected, synthetic)
        assert math.isclose(loss, float(expected.detach()), rel_tol=1e-4)
        torch.testing.assert_close(images.grad.double(), slope, rtol=1e-2, atol=1e-3 * float(slope.abs().max()))


def test_biases_and_norms_contribute_nothing():
    first = [torch.randn(4, 3, 3, 3), torch.randn(5), torch.randn(2, 7)]
    second = [torch.randn(4, 3, 3, 3), torch.randn(5), torch.randn(2, 7)]
    got = dc.distance(first, second)
    rows = [1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=0) for a, b in
            ((first[0], second[0]), (first[2], second[2]))]
    torch.testing.assert_close(got, torch.cat(rows).sum(), rtol=1e-4, atol=1e-5)
    second[1] = second[1] * -3
    assert torch.equal(dc.distance(first, second), got)
    assert float(dc.distance(first, first)) < 1e-4
    assert float(dc.distance(first, [torch.zeros_like(g) for g in first])) == 6  # a row without a gradient counts 1


@pytest.mark.parametrize(("ipc", "loops"), [(1, (1, 1)), (4, (1, 1)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20)),
                                            (40, (40, 15)), (50, (50, 10)), (80, (50, 10))])
def test_the_loops_are_the_originals(ipc, loops):
    assert dc.Spec().loops(ipc) == loops
    assert dc.Spec(outer=7).loops(ipc) == (7, loops[1])


@pytest.mark.parametrize("name", ["dc", "dsa"])
def test_the_student_trains_between_matchings_and_is_drawn_anew(name):
    real = make_real(resolution=8)
    run = loop.Run(resolve(TABLES, name), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    seen = []
    for _ in range(4):
        run.advance()
        seen.append([p.detach().clone() for p in run.objective._student.parameters() if p.ndim > 1])
    fresh = [dc.matched(run.objective._fresh(number)) for number in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], fresh[0]))
    assert all(torch.equal(a, b) for a, b in zip(seen[3], fresh[1]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))


def test_training_the_student_is_plain_sgd():
    real = make_real(resolution=8)
    run = loop.Run(resolve(TABLES, "dc", {"ipc": 1, "inner_batch": 8}), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    objective = run.objective
    objective._student = objective._fresh(0)
    expected = objective._fresh(0)
    images, labels = run.synthetic.images.detach(), run.synthetic.classes
    with objective._pool:
        objective._train(images, labels, 2, torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(expected.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    for got, want in zip(objective._student.parameters(), expected.parameters()):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "stop"), [("dc", 2), ("dc", 3), ("dsa", 4)])
def test_a_run_resumes_to_the_same_bytes(name, stop, tmp_path):
    real = make_real(resolution=8)
    whole = loop.distill(resolve(TABLES, name), real, tmp_path / "whole").read_bytes()
    loop.distill(resolve(TABLES, name, {"steps": stop}), real, tmp_path / "run")
    assert loop.distill(resolve(TABLES, name), real, tmp_path / "run", resume=True).read_bytes() == whole


def test_matching_lowers_the_distance():
    real = make_real(resolution=8)
    run = loop.Run(resolve(TABLES, "dc", {"outer": 1}), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    losses = [run.advance()["loss"] for _ in range(30)]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("inner_batch", 0), ("outer", -1), ("inner", -1),
                                              ("inner_rate", 0.0), ("lr", -1.0)])
def test_what_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}="):
        resolve(TABLES, "dsa", {f"objective.{field}": value})
