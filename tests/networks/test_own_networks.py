"""Networks of the user's own by their dotted path: what works, one line for what does not, and no import unasked."""

from __future__ import annotations

import sys

import pytest
import torch

from speedk import networks
from speedk.cli import main
from speedk.distillation import plan
from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.networks import _own

GEOMETRY = Geometry(10, 1, 32)
SOURCE = '''
import torch
from torch import nn

class Net(nn.Module):
    """Plain, with features and dropout."""

    def __init__(self, channels, classes, resolution):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(channels * resolution**2, 8), nn.ReLU(), nn.Dropout(0.5))
        self.outer = nn.Linear(8, classes)

    def features(self, images):
        return self.inner(images)

    def forward(self, images):
        return self.outer(self.inner(images))

class Blind(nn.Module):
    """Without features."""

    def __init__(self, channels, classes, resolution):
        super().__init__()
        self.all = nn.Sequential(nn.Flatten(), nn.Linear(channels * resolution**2, classes))

    def forward(self, images):
        return self.all(images)

class Mixing(Blind):
    """With BatchNorm."""

    def __init__(self, channels, classes, resolution):
        super().__init__(channels, classes, resolution)
        self.all = nn.Sequential(nn.BatchNorm2d(channels), *self.all)

class Short(Blind):
    def forward(self, images):
        return self.all(images)[:, :-1]

class Broken(Blind):
    def forward(self, images):
        return self.all(images[:, :, 1:])

class Other(nn.Module):
    def __init__(self, width, num_classes=10):
        super().__init__()

class Failing(Blind):
    def __init__(self, in_channels, num_classes):
        raise ValueError("no")

class Named(Blind):
    """As libraries of networks have it; channels is its width."""

    def __init__(self, image_size=224, in_channels=3, num_classes=1000, channels=64):
        super().__init__(in_channels, num_classes, image_size)
        assert channels == 64

class Classes(Blind):
    def __init__(self, *, num_classes, **options):
        super().__init__(1, num_classes, 32)
        assert not options

class Empty(Blind):
    """With nothing to train."""

    def __init__(self, channels, classes, resolution):
        super().__init__(channels, classes, resolution)
        self.requires_grad_(False)

class Placed(Blind):
    def __init__(self, c, k, side, /):
        super().__init__(c, k, side)

class Fixed(Blind):
    def __init__(self):
        super().__init__(1, 10, 32)

number = 3

def function(channels, classes, resolution):
    return [channels, classes]
'''


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of a name of its own in the current folder; gives that name."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(_own, "_allowed", set())
    yield name
    sys.modules.pop(name, None)


def test_a_class_of_the_current_folder(nets):
    name = networks.given(f"{nets}:Net")
    network = networks.fresh(name, GEOMETRY, 3)
    again = networks.fresh(name, GEOMETRY, 3)
    assert network.training and network(torch.zeros(4, 1, 32, 32)).shape == (4, 10)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters()))
    student = networks.student(name, GEOMETRY, 3, features=True)
    images = torch.randn(4, 1, 32, 32)
    assert torch.equal(student(images), student(images))  # no dropout


def test_a_class_with_nothing_to_train(nets):
    name = networks.given(f"{nets}:Empty")
    with pytest.raises(ConfigError, match="Empty has no parameters to train"):
        networks.fresh(name, GEOMETRY, 3)


@pytest.mark.parametrize("name", ["Blind", "Named", "Classes", "Placed", "Fixed"])
def test_a_class_gets_what_it_has_parameters_for(nets, name):
    network = networks.build(networks.given(f"{nets}:{name}"), GEOMETRY)
    assert network.all[1].weight.shape == (10, 32 * 32)


def test_a_class_of_fixed_sizes_is_for_its_own_data(nets):
    with pytest.raises(ConfigError, match=r"gives \[2, 10\] for two images, not logits of shape \[2, 100\]"):
        networks.build(networks.given(f"{nets}:Fixed"), Geometry(100, 1, 32))


def test_nothing_is_imported_that_the_user_did_not_name(nets):
    with pytest.raises(ConfigError, match="only where you name it yourself: say network="):
        networks.build(f"{nets}:Net", GEOMETRY)
    assert nets not in sys.modules


@pytest.mark.parametrize(("name", "message"), [
    ("Other", "needs width, and gets by name only in_channels, num_classes and image_size"),
    ("Failing", r"Failing\(in_channels=1, num_classes=10\) fails: ValueError: no"),
    ("number", "is no class or function that can be called: TypeError: "),
    ("Short", r"gives \[2, 9\] for two images, not logits of shape \[2, 10\]"),
    ("Broken", r"fails on two images of \[1, 32, 32\]: RuntimeError: "),
    ("function", "gives a list, not a torch.nn.Module"),
    ("Nett", "has no 'Nett'"),
])
def test_what_is_wrong_is_said_in_one_line(nets, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        networks.build(networks.given(f"{nets}:{name}"), GEOMETRY)
    assert "\n" not in str(caught.value)


def test_names_that_cannot_be(nets):
    for name in (f"{nets}:", ":Net", "a-b:Net", "a:b.c", "a:b:c"):
        with pytest.raises(ConfigError, match="is not module:Class"):
            networks.given(name)
    with pytest.raises(ConfigError, match="nor module:Class; did you mean 'convnet'"):
        networks.given("convnett")
    with pytest.raises(ConfigError, match="importing no_such_module failed: ModuleNotFoundError"):
        networks.build(networks.given("no_such_module:Net"), GEOMETRY)


def test_students_must_fit_the_matching(nets):
    with pytest.raises(ConfigError, match=r"has no method features\(images\)"):
        networks.student(networks.given(f"{nets}:Blind"), GEOMETRY, 0, features=True)
    with pytest.raises(ConfigError, match="cannot be a student: its BatchNorm"):
        networks.student(networks.given(f"{nets}:Mixing"), GEOMETRY, 0)
    assert networks.student(f"{nets}:Blind", GEOMETRY, 0)


@pytest.mark.parametrize(("network", "objective", "message"), [
    ("Blind", "dm", "has no method features(images)"), ("Mixing", "dc", "its BatchNorm mixes the images")])
def test_a_student_that_is_refused_leaves_nothing(nets, tmp_path, capsys, network, objective, message):
    words = ["distill", "--objective", objective, "--steps", "1", "batch=4", "--method", "pixels", "--out", "run"]
    assert main([*words, "--network", f"{nets}:{network}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*words, "--network", f"{nets}:Net"]) == 0


def test_distil_and_evaluate_with_it(nets, capsys):
    small = ["--steps", "1", "batch=4", "--method", "pixels", "--out", "run"]
    assert main(["distill", "--objective", "dc", "--network", f"{nets}:Blind", *small]) == 0
    _own._allowed.clear()
    assert main(["distill", "--out", "run", "--resume"]) == 1
    said = capsys.readouterr().err
    assert f"say network={nets}:Blind" in said and "start anew" not in said
    assert main(["distill", "--out", "run", "--resume", f"network={nets}:Blind"]) == 0
    _own._allowed.clear()
    arguments = ["evaluate", "run/distilled.safetensors", "--runs", "1", "--epochs", "1"]
    assert main([*arguments, "--networks", f"mlp,{nets}:Mixing"]) == 0
    assert f"{nets}:Mixing" in capsys.readouterr().out
    assert main([*arguments, "--networks", f"{nets}:Nett"]) == 1
    assert "has no 'Nett'" in capsys.readouterr().err


def test_a_recipe_of_ones_own_names_it(nets, tmp_path):
    (tmp_path / "mine.toml").write_text(
        f'[data]\nname = "digits"\n[parameterization]\nmethod = "pixels"\n[objective.dm]\nnetwork = "{nets}:Net"\n')
    assert plan.plan(recipe="mine.toml", objective="dm").recipe.objective.network == f"{nets}:Net"
    assert networks.build(f"{nets}:Net", GEOMETRY)
