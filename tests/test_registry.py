"""Plug-ins: what a file must be to count as one, and the line that a wrong one is refused with."""

from __future__ import annotations

import importlib
import sys

import pytest

from speedk import networks, registry
from speedk.distillation import coresets, objectives, parameterizations
from speedk.distillation.plan import plan
from speedk.errors import ConfigError

FOLDERS = {"parameterizations": parameterizations, "objectives": objectives, "coresets": coresets,
           "networks": networks}
OBJECTIVE = """
from dataclasses import dataclass
from speedk.distillation.objectives.base import Objective, ObjectiveSpec

@dataclass(frozen=True)
class Spec(ObjectiveSpec):
    more: int = 1

class Toy(Objective):
    name, Spec = "toy", Spec
    def step(self, synthetic, step): ...

PLUGIN = Toy
"""
METHOD = """
from speedk.distillation.parameterizations.base import Parameterization, ParameterizationSpec
class Toy(Parameterization):
    name, Spec = "toy", ParameterizationSpec
    initialise = decode = param_groups = storage = from_storage = planned_storage = None
PLUGIN = Toy
"""
CORESET = """
from speedk.distillation.coresets.base import Coreset
class Toy(Coreset):
    name, says, choose = "toy", "real images", None
PLUGIN = Toy
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Makes a text the file `toy` of a folder, and finds it there."""
    seen = []

    def find(folder, text):
        package = FOLDERS[folder]
        seen.append(package)
        (tmp_path / "toy.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        importlib.invalidate_caches()
        return registry.find(package, "toy")

    yield find
    for package in seen:
        sys.modules.pop(f"{package.__name__}.toy")
        del package.toy


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_what_its_folder_asks_for(folder):
    for name in registry.names(FOLDERS[folder]):
        assert issubclass(registry.find(FOLDERS[folder], name), FOLDERS[folder].INTERFACE)


@pytest.mark.parametrize(("folder", "text"), [
    ("objectives", OBJECTIVE), ("parameterizations", METHOD), ("coresets", CORESET),
    ("networks", "from torch.nn import Linear as PLUGIN"),
])
def test_one_file_is_a_plug_in(toy, folder, text):
    assert toy(folder, text).__name__ in ("Toy", "Linear")


def test_what_is_new_has_outer_settings_of_its_method_or_its_own(toy):
    def settled(**asked):
        found = plan("digits", device="cpu", ipc=2, **asked).recipe.objective
        return found.optimizer, found.schedule, found.steps

    toy("objectives", OBJECTIVE)
    assert settled(objective="toy") == ("adam", "cosine", 20000)
    assert settled(objective="toy", method="pixels") == ("sgd", "constant", 20000)
    toy("parameterizations", METHOD.replace("= planned_storage = None", "= None; planned_storage = lambda *_: {}"))
    assert settled(objective="toy", method="toy") == ("sgd", "constant", 20000)
    assert settled(objective="dm", method="toy") == ("sgd", "constant", 2000)


@pytest.mark.parametrize(("folder", "text", "said"), [
    ("objectives", OBJECTIVE.replace("PLUGIN = Toy", ""), "has no PLUGIN that is a subclass of Objective"),
    ("objectives", OBJECTIVE.replace("Toy(Objective)", "Toy"), "has no PLUGIN that is a subclass of Objective"),
    ("objectives", OBJECTIVE.replace('"toy"', '"other"'), "name = 'other', but a file's name is the plug-in's: 'toy'"),
    ("objectives", OBJECTIVE.replace("name, Spec", "_, _"), "Toy, that lacks name, Spec"),
    ("objectives", OBJECTIVE.replace("def step", "def stop"), "Toy, that lacks step"),
    ("objectives", OBJECTIVE.replace("Spec(ObjectiveSpec)", "Spec"), "no dataclass extending ObjectiveSpec"),
    ("objectives", OBJECTIVE.replace("@dataclass(frozen=True)", ""), "no dataclass extending ObjectiveSpec"),
    ("parameterizations", METHOD.replace(", Spec = ", ", _ = "), "Toy, that lacks Spec"),
    ("parameterizations", METHOD.replace("decode = ", ""), "Toy, that lacks decode"),
    ("coresets", CORESET.replace("says,", "sais,"), "Toy, that lacks says"),
    ("networks", "PLUGIN = print", "has no PLUGIN that is a subclass of Module"),
])
def test_a_wrong_file_is_refused_in_a_line(toy, tmp_path, folder, text, said):
    with pytest.raises(ConfigError) as refused:
        toy(folder, text)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'toy.py'} has ") and said in line and "\n" not in line
