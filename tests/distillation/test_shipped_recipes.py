"""Every shipped recipe fits its budget and runs, with the sizes it has, on a few images of the right shape."""

import functools
import json
import math

import pytest
import torch
from toys import make_real

from speedk.distillation import loop
from speedk.distillation import recipe as recipes
from speedk.distillation.recipe import find_row, read, resolve, shipped

FEW = {"images_per_class": 1, "fit_steps": 1}
TOY_EXPERTS = {"expert_count": 1, "max_start": 1, "expert_epochs": 1, "inner_steps": 2}
PUBLISHED = """
cifar10       1   17  32  16 2 1  48 4  64  48 3e-6  64 60 10     29,872     30,720
cifar10      10  124  96  64 3 1  48 4  64  48 3e-7 128 60 20    306,960    307,200
cifar10      50  272 192  64 6 3  48 4  64  48 7e-8 256 60 40  1,532,400  1,536,000
cifar100      1   11  96  64 3 2  48 4  64  48 3e-7 128 60 40    305,040    307,200
cifar100     10   62 192  64 6 3  48 4  64  48 7e-8 256 60 40  3,035,760  3,072,000
cifar100     50  100 192  64 6 3 166 4  64  48 3e-8 256 60 40 15,297,360 15,360,000
tinyimagenet  1   17 256 128 8 2  48 8  64 192 7e-8 340 20 40  2,437,312  2,457,600
tinyimagenet 10   78 256 128 8 2 128 8  64 192 7e-9 780 20 40 24,440,512 24,576,000
imagenette    1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagenette   10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagewoof     1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imagewoof    10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
imagefruit    1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagefruit   10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagemeow     1   15 192 256 4 2 192 8 256 192 7e-7  32 60 10    482,880    491,520
imagemeow    10  111 384 256 6 2 384 8 256 192 7e-8  32 40 20  4,898,496  4,915,200
imagesquawk   1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imagesquawk  10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
imageyellow   1   15 192 256 4 2 192 8 256 192 3e-7  32 60 10    482,880    491,520
imageyellow  10  111 384 256 6 2 384 8 256 192 3e-8  32 40 20  4,898,496  4,915,200
"""
"""The published recipes, typed in from the table of them: data, images a class, N/c, D, K, H, R, k, patch, J, L,
penalty, batch, steps of the student, max start, parameters, budget."""
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


@pytest.mark.parametrize("row", PUBLISHED.split("\n")[1:-1], ids=lambda row: "-ipc".join(row.split()[:2]))
def test_a_published_recipe_is_the_published_one(row):
    name, *numbers = row.replace(",", "").split()
    ipc, N, D, K, H, R, k, patch, J, L, penalty, batch, inner_steps, max_start, counted, allowed = map(float, numbers)
    recipe = resolve(read(f"{name}-ipc{ipc:.0f}-speed"), "tm")
    spec, tm, geometry = recipe.parameterization, recipe.objective, recipes.geometry(recipe)
    assert (recipe.data.name, recipe.data.ipc, recipe.data.budget, recipe.data.resolution) == (name, ipc, "on", 0)
    assert (spec.images_per_class, spec.D, spec.K, spec.H, spec.R, spec.k) == (N, D, K, H, R, k)
    assert (spec.patch, spec.patches(geometry), spec.patch**2 * geometry.channels) == (patch, J, L)
    assert (spec.penalty, tm.batch, tm.inner_steps, tm.max_start) == (penalty, batch, inner_steps, max_start)
    spent = recipe.budget(geometry)
    assert (spent.counted, spent.allowed) == (counted, allowed)
    # The one set of the rest, for all rows.
    assert (tm.optimizer, tm.momentum, tm.schedule, tm.steps) == ("sgd", 0.95, "constant", 20000)
    assert tm.rates == {"saet": 10.0, "scm": 100.0, "freenet": 0.01, "synthetic_lr": 1e-5}
    assert (tm.synthetic_lr, tm.synthetic_lr_floor, tm.inner_momentum, tm.expert_epochs) == (0.01, 0.001, 0.9, 2)
    assert (tm.expert_count, tm.expert_rate, tm.expert_batch, tm.augment) == (100, 0.01, 256, True)
    assert (tm.network, tm.precision) == ("convnet", "float32")
    assert (spec.sparsify, spec.shared, spec.convolutions) == ("global", "both", 0)


def test_every_published_recipe_is_in_the_table():
    rows = {"-ipc".join(row.split()[:2]) + "-speed" for row in PUBLISHED.split("\n")[1:-1]}
    assert rows == {name for name, text in shipped().items() if "published code's" in text.partition("[recipe]")[0]}


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
