"""Every shipped recipe fits its budget and runs, with the sizes it has, on a few images of the right shape."""

import functools
import json
import math

import published
import pytest
import torch
from toys import make_real

from speedk.distillation import loop
from speedk.distillation import recipe as recipes
from speedk.distillation.recipe import find_row, read, resolve, shipped

FEW = {"images_per_class": 1, "fit_steps": 1}
TOY_EXPERTS = {"expert_count": 1, "max_start": 1, "expert_epochs": 1, "inner_steps": 2}
CASES = [(name, objective) for name in shipped() for objective in read(name)["objective"]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the experts go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEEDK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", list(shipped()))
def test_it_fits_its_budget_and_says_where_it_comes_from(name):
    recipe = resolve(read(name), "dm")
    spent = recipe.budget(recipes.geometry(recipe))
    assert 0.95 * spent.allowed < spent.counted <= spent.allowed
    opening = shipped()[name].partition("[recipe]")[0]
    assert f"{spent.counted:,.0f}" in opening or recipe.data.name == "digits"
    assert all(word in opening for word in recipe.about.published.split())
    assert "speedk distill" in opening
    if "published code's" in opening:  # whose start and top-k are others
        spec = recipe.parameterization
        assert (spec.init, spec.sparse) == ("fit", "always") and "init and sparse are speedk's own" in opening
        assert "fit and always, where the paper has random and end" in " ".join(opening.replace("#", "").split())
    if recipe.method == "speed":
        spec = recipe.parameterization
        assert spec.D // spec.H <= spec.K and spec.k < 0.05 * spec.K * spec.patches(recipes.geometry(recipe))


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: row.recipe)
def test_a_published_recipe_is_the_published_one(row):
    recipe = resolve(read(row.recipe), "tm")
    spec, tm, geometry = recipe.parameterization, recipe.objective, recipes.geometry(recipe)
    data = recipe.data
    assert (data.name, data.ipc, data.budget, data.resolution) == (row.data, row.ipc, "on", 0)
    assert geometry == row.geometry
    assert (spec.images_per_class, spec.D, spec.K, spec.H, spec.R, spec.k) == row[2:8]
    assert (spec.patch, spec.patches(geometry), spec.patch**2 * geometry.channels) == (row.patch, row.J, row.L)
    assert (spec.penalty, tm.batch, tm.inner_steps, tm.max_start) == row[11:15]
    spent = recipe.budget(geometry)
    assert (spent.counted, spent.allowed) == (row.counted, row.budget)
    # The one set of the rest, for all rows.
    assert (tm.optimizer, tm.momentum, tm.schedule, tm.steps) == ("sgd", 0.95, "constant", 20000)
    assert tm.rates == {"saet": 10.0, "scm": 100.0, "freenet": 0.01, "synthetic_lr": 1e-5}
    assert (tm.synthetic_lr, tm.synthetic_lr_floor, tm.inner_momentum, tm.expert_epochs) == (0.01, 0.001, 0.9, 2)
    assert (tm.expert_count, tm.expert_rate, tm.expert_batch, tm.augment) == (100, 0.01, 256, True)
    assert (tm.network, tm.precision) == ("convnet", "float32")
    assert (spec.sparsify, spec.shared, spec.convolutions) == ("global", "both", 0)


def test_every_published_recipe_is_in_the_table():
    rows = {row.recipe for row in published.ROWS}
    assert rows == {name for name, text in shipped().items() if "published code's" in text.partition("[recipe]")[0]}


@pytest.mark.parametrize("name", [name for name in shipped() if name.endswith("-pixels")])
def test_pixels_are_learned_as_the_originals_do(name):
    """SGD with momentum 0.5 at the rate 1 for distribution matching and 0.1 for gradient matching, from real images."""
    for objective in {"dm", "dc", "dsa"} & set(read(name)["objective"]):
        recipe = resolve(read(name), objective)
        found = recipe.objective
        assert (found.optimizer, found.momentum, found.schedule) == ("sgd", 0.5, "constant")
        assert found.rates == {"pixels": 1.0 if objective == "dm" else 0.1}
        assert (found.lr, found.augment) == (0.01, objective != "dc") and recipe.parameterization.init == "real"
        if recipe.data.name != "digits":  # which is to be done in a minute
            assert found.batch == 256 or recipe.data.name.startswith("image")
            assert found.steps == (2000 if objective == "dm" else 1000 * recipe.data.ipc)  # outer is 1, 10, 20, 50


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_it_runs_three_steps(name, objective):
    """The recipe's own sizes, rates and network; two classes of two images, batches of one, and one expert of an
    epoch."""
    fewer = {"objective.batch": 1, "steps": 3, "ipc": 1, "budget": "off"}
    recipe = resolve(read(name), objective)
    fewer |= FEW if recipe.method == "speed" else {}
    fewer |= {"inner": 1, "outer": 2} if objective in ("dc", "dsa") and recipe.data.ipc > 1 else {}
    fewer |= TOY_EXPERTS if objective == "tm" else {}
    geometry = recipes.geometry(recipe)
    tables = resolve(read(name), objective, fewer).to_dict()
    del tables["recipe"], tables["data"]["name"]
    run_three_steps(json.dumps(tables), geometry.channels, geometry.resolution)


@functools.cache
def run_three_steps(tables, channels, resolution):
    """Once for those that differ in nothing but their name: the ImageNet subsets."""
    real = make_real(classes=2, channels=channels, resolution=resolution, count=2)
    run = loop.Run(recipes.from_resolved(json.loads(tables)), real, torch.device("cpu"))
    run.initialise(loop.Progress())
    start = [p.detach().clone() for p in run.synthetic.parameters()]
    losses = [run.advance()["loss"] for _ in range(3)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert not any(torch.equal(a, b) for a, b in zip(start, run.synthetic.parameters()))
    run.synthetic.finalize()
    assert bool(torch.isfinite(run.synthetic.decode(torch.arange(run.synthetic.size))[0]).all())


def test_every_row_is_there():
    rows = {("cifar10", ipc) for ipc in (1, 10, 50)} | {("cifar100", ipc) for ipc in (1, 10, 20, 50)}
    rows |= {("tinyimagenet", ipc) for ipc in (1, 10, 50)}
    rows |= {(f"image{subset}", ipc) for subset in ("nette", "woof", "fruit", "meow", "squawk", "yellow")
             for ipc in (1, 10)}
    for dataset, ipc in rows:
        for method in ("speed", "pixels"):
            assert find_row(dataset, ipc, method) == f"{dataset}-ipc{ipc}-{method}"
    assert {"imagenette256-ipc1-speed", "imagenette256-ipc1-pixels"} <= set(shipped())
