"""Recipes: reading, overriding, refusing, and the way back from a run's own file."""

import dataclasses
import json
import re

import pytest

from speedk.distillation import recipe as recipes
from speedk.distillation.plan import plan
from speedk.distillation.recipe import from_resolved, parse_overrides, read, resolve, shipped, to_toml
from speedk.errors import ConfigError

ROW = "cifar10-ipc1-speed"


OWN = [(name, objective) for name in shipped() for objective in read(name)["objective"]]


@pytest.mark.parametrize(("name", "objective"), OWN)
def test_every_shipped_recipe_resolves_and_survives_its_own_file(name, objective, tmp_path):
    recipe = resolve(read(name), objective)
    assert recipe.about.name == name
    assert {**read(name)["objective"][objective], "name": objective}.items() <= recipe.to_dict()["objective"].items()
    path = tmp_path / "recipe.toml"
    path.write_text(recipes.to_toml(recipe.to_dict()))
    assert recipes.from_resolved(read(path)) == recipe
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@pytest.mark.parametrize("name", list(shipped()))
def test_a_recipe_has_settings_for_every_number_it_quotes(name):
    quoted = re.findall(r"\((\w+)\)", resolve(read(name), "dm").about.published)
    assert set(quoted) <= set(read(name)["objective"])


def test_the_published_protocol_standardises_for_experts_too():
    def standardise(objective="tm", tables=None, **changes):
        return resolve(tables or read(ROW), objective, changes).objective.standardise

    assert standardise(protocol="speed") and standardise(**{"run.protocol": "speed"})
    assert not standardise() and not standardise(protocol="mtt") and not standardise(protocol="speed",
                                                                                     standardise=False)
    own = read(ROW) | {"run": {"protocol": "speed"}}
    assert standardise(tables=own)
    own["objective"]["tm"]["standardise"] = False
    assert not standardise(tables=own)
    earlier = resolve(own, "tm").to_dict()  # a run that was begun without stays so
    assert not from_resolved(earlier).objective.standardise
    assert resolve(read(ROW), "dm", {"protocol": "speed"}).run.protocol == "speed"


def test_some_classes_have_the_budget_of_their_number():
    whole = resolve(read("cifar100-ipc20-speed"), "tm")
    assert "classes" not in whole.to_dict()["data"]  # as before there was the field: such runs go on
    part = resolve(read("cifar100-ipc20-speed"), "tm", parse_overrides(["classes=20-39", "images_per_class=60"]))
    assert from_resolved(part.to_dict()) == part and part.to_dict()["data"]["classes"] == "20-39"
    spent = part.budget(recipes.geometry(part))
    assert spent.allowed == whole.budget(recipes.geometry(whole)).allowed / 5 and spent.counted > 0.99 * spent.allowed
    with pytest.raises(ConfigError):  # what the classes share weighs more on few of them
        resolve(read("cifar100-ipc20-speed"), "tm", {"classes": "20-39"}).budget(recipes.geometry(part))


def test_overrides():
    pairs = ["k=24", "rates.scm=0.5", "objective.batch=8", "norm=sum", "lr=1"]
    recipe = resolve(read(ROW), "dm", parse_overrides(pairs))
    assert (recipe.parameterization.k, recipe.objective.rates["scm"], recipe.objective.batch) == (24, 0.5, 8)
    assert recipe.parameterization.norm == "sum" and recipe.objective.lr == 1.0
    assert resolve(read(ROW), "dm").parameterization.k == 48


@pytest.mark.parametrize(("pairs", "message"), [
    (["stepz=3"], "no recipe field 'stepz'; did you mean 'steps'"),
    (["k=many"], "parameterization.k='many' must be a whole number"),
    (["k=true"], "must be a whole number"),
    (["lr=nan"], "must be finite"),
    (["k=-1"], "k=-1 is outside"),
    (["k=0"], "k=0 is outside 1 to"),
    (["penalty=-5"], "penalty=-5 must not be negative; -1 means"),
    (["D=33"], "D=33 is not a multiple of H=2"),
    (["patch=5"], "patch=5 does not divide"),
    (["norm=post"], "norm='post' is not one of branch, sum"),
    (["init=magic"], "init='magic' is not one of random, fit"),
    (["optimizer=lion"], "optimizer='lion' is not one of sgd, adam"),
    (["batch=0"], "batch=0 must be at least 1"),
    (["steps=-1"], "steps=-1 must not be negative"),
    (["protocol=mine"], "protocol='mine' is not one of mtt, speed"),
    (["ipc=0"], "ipc=0 must be at least 1"),
    (["k"], "'k' is not key=value"),
    (["k.x=1"], "parameterization.k=.* is no table"),
    (["seed=-1"], "seed=-1 is not from 0 to"),
    (["seed=18446744073709551616"], "seed=18446744073709551616 is not from 0 to"),
    (["budget=maybe"], "budget='maybe' must be on or off"),
])
def test_what_is_refused(pairs, message):
    from speedk.geometry import Geometry

    with pytest.raises(ConfigError, match=message):
        resolve(read(ROW), "dm", parse_overrides(pairs)).budget(Geometry(10, 3, 32))


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'cifar10-ipc1-speed'"):
        read("cifar10-ipc1-sped")
    with pytest.raises(ConfigError, match=r"no table \[dta\]; did you mean 'data'"):
        resolve({"dta": {}, "parameterization": {"method": "pixels"}}, "dm")
    with pytest.raises(ConfigError, match="'speedy' is not one of .*did you mean 'speed'"):
        resolve({"parameterization": {"method": "speedy"}}, "dm")
    with pytest.raises(ConfigError, match="'dmm' is not one of"):
        resolve({"parameterization": {"method": "pixels"}}, "dmm")
    with pytest.raises(ConfigError, match="lacks the field 'images_per_class'"):
        resolve({"parameterization": {"method": "speed"}}, "dm")
    (tmp_path / "bad.toml").write_text("k = [")
    with pytest.raises(ConfigError, match="not TOML"):
        read(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("run = 3")
    with pytest.raises(ConfigError, match="run is no table"):
        read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match=r"a table for each, \[objective.dm\]"):
        resolve({"parameterization": {"method": "pixels"}, "objective": {"steps": 3}}, "dm")


def test_any_text_survives_the_file(tmp_path):
    made = resolve(read(ROW), "tm", {"experts": "a\t\"b\"\\c\x1b\x7f\u20ac\U0001f600"})
    (tmp_path / "recipe.toml").write_text(to_toml(made.to_dict()), encoding="utf-8")
    assert from_resolved(read(tmp_path / "recipe.toml")) == made


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(read(ROW), "dm").parameterization.k = 3


@pytest.mark.parametrize("method", ["pixels", "speed"])
def test_gradient_matching_without_a_shipped_recipe_takes_the_originals_steps(method):
    """1,000 students, each matched once at 1 and 10 times at 10 images a class (Zhao et al. 2021)."""
    for objective, steps in (("dc", 10_000), ("dsa", 10_000), ("dm", 2000)):
        made = plan("digits", ipc=10, method=method, objective=objective, device="cpu")
        assert made.recipe.objective.steps == steps


def test_a_rate_is_not_what_it_is_the_rate_of():
    fields = {"rates.synthetic_lr": 5e-4, "synthetic_lr": 0.05, "objective.rates.scm": 0.03}
    made = plan("digits", objective="tm", device="cpu", overrides=fields)
    assert made.recipe.objective.synthetic_lr == 0.05
    assert made.recipe.objective.rates["synthetic_lr"] == 5e-4 and made.recipe.objective.rates["scm"] == 0.03
    for other in ({"objective.synthetic_lr": 0.04}, {"rates.scm": 0.02}):
        with pytest.raises(ConfigError, match="do not agree"):
            plan("digits", objective="tm", device="cpu", overrides=fields | other)
