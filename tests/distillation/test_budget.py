"""Eq. 7 for the ten published rows, and the solver for rows that are not published."""

import pytest

from speedk.distillation import budget
from speedk.distillation import recipe as recipes
from speedk.errors import ConfigError
from speedk.geometry import Geometry

# classes, channels, resolution, ipc, N/c, D, K, H, R, k, patch, J, L, counted, budget: docs of the published code.
PUBLISHED = {
    "cifar10-ipc1": (10, 3, 32, 1, 17, 32, 16, 2, 1, 48, 4, 64, 48, 29_872, 30_720),
    "cifar10-ipc10": (10, 3, 32, 10, 124, 96, 64, 3, 1, 48, 4, 64, 48, 306_960, 307_200),
    "cifar10-ipc50": (10, 3, 32, 50, 272, 192, 64, 6, 3, 48, 4, 64, 48, 1_532_400, 1_536_000),
    "cifar100-ipc1": (100, 3, 32, 1, 11, 96, 64, 3, 2, 48, 4, 64, 48, 305_040, 307_200),
    "cifar100-ipc10": (100, 3, 32, 10, 62, 192, 64, 6, 3, 48, 4, 64, 48, 3_035_760, 3_072_000),
    "cifar100-ipc50": (100, 3, 32, 50, 100, 192, 64, 6, 3, 166, 4, 64, 48, 15_297_360, 15_360_000),
    "tinyimagenet-ipc1": (200, 3, 64, 1, 17, 256, 128, 8, 2, 48, 8, 64, 192, 2_437_312, 2_457_600),
    "tinyimagenet-ipc10": (200, 3, 64, 10, 78, 256, 128, 8, 2, 128, 8, 64, 192, 24_440_512, 24_576_000),
    "imagenette-ipc1": (10, 3, 128, 1, 15, 192, 256, 4, 2, 192, 8, 256, 192, 482_880, 491_520),
    "imagenette-ipc10": (10, 3, 128, 10, 111, 384, 256, 6, 2, 384, 8, 256, 192, 4_898_496, 4_915_200),
}
PENALTY = {"cifar10-ipc1": 3e-6, "cifar10-ipc10": 3e-7, "cifar10-ipc50": 7e-8, "cifar100-ipc1": 3e-7,
           "cifar100-ipc10": 7e-8, "cifar100-ipc50": 3e-8, "tinyimagenet-ipc1": 7e-8, "tinyimagenet-ipc10": 7e-9,
           "imagenette-ipc1": 7e-7, "imagenette-ipc10": 7e-8, "imagewoof-ipc1": 3e-7, "imageyellow-ipc10": 3e-8}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_rows(row):
    classes, channels, resolution, ipc, images, D, K, H, R, k, patch, J, L, counted, allowed = PUBLISHED[row]
    assert sum(budget.speed_storage(images * classes, D, K, H, R, k, J, L).values()) == counted
    assert Geometry(classes, channels, resolution).budget(ipc) == allowed
    assert counted <= allowed and D // H <= K and k / (J * K) < 0.05
    recipe = recipes.resolve(recipes.read(f"{row}-speed"), "dm")
    spec = recipe.parameterization
    assert (spec.images_per_class, spec.D, spec.K, spec.H, spec.R, spec.k, spec.patch) == (images, D, K, H, R, k, patch)
    assert recipe.budget(Geometry(classes, channels, resolution)).counted == counted


@pytest.mark.parametrize("row", PENALTY)
def test_the_published_penalties_are_near_the_papers_rule(row):
    recipe = recipes.resolve(recipes.read(f"{row}-speed"), "dm")
    geometry = Geometry({"c": 10, "t": 200, "i": 10}[row[0]] if "100" not in row else 100, 3,
                        {"c": 32, "t": 64, "i": 128}[row[0]])
    spec = recipe.parameterization
    assert spec.weight(geometry) == PENALTY[row]
    rule = 0.064 / (spec.images_per_class * geometry.classes * spec.H * spec.patches(geometry))
    assert 0.69 < PENALTY[row] / rule < 2.61


def test_the_embedded_recipe():
    recipe = recipes.resolve(recipes.read("digits-ipc1-speed"), "dm")
    assert recipe.budget(Geometry(10, 1, 32)).counted == 10_096
    assert Geometry(10, 1, 32).budget(1) == 10_240


def test_sixteen_bit_coordinates_cost_two_floats():
    narrow = budget.speed_storage(10, 8, 256, 2, 1, 5, 256, 48)
    wide = budget.speed_storage(10, 8, 257, 2, 1, 5, 256, 48)
    assert narrow["scm coordinates"] == 0.5 * narrow["scm values"] == 50
    assert wide["scm coordinates"] == wide["scm values"] == 100


def test_over_the_budget_is_refused_with_the_sum():
    tables = recipes.read("digits-ipc1-speed")
    over = recipes.resolve(tables, "dm", {"images_per_class": 9})
    with pytest.raises(ConfigError, match=r"= 10,816 float32 numbers, but 10,240 .* budget=off"):
        over.budget(Geometry(10, 1, 32))
    allowed = recipes.resolve(tables, "dm", recipes.parse_overrides(["images_per_class=9", "budget=off"]))
    assert allowed.budget(Geometry(10, 1, 32)).counted == 10_816


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_solver_keeps_the_papers_rules(row):
    classes, channels, resolution, ipc, *_, allowed = PUBLISHED[row]
    sizes = budget.solve(Geometry(classes, channels, resolution), ipc)
    J, L = (resolution // sizes["patch"]) ** 2, sizes["patch"] ** 2 * channels
    assert PUBLISHED[row][11] == J
    N = sizes["images_per_class"] * classes
    counted = sum(budget.speed_storage(N, *(sizes[n] for n in "DKHRk"), J, L).values())
    assert 0.9 * allowed < counted <= allowed
    assert sizes["D"] // sizes["H"] <= sizes["K"] and sizes["k"] / (J * sizes["K"]) < 0.05
    assert sizes["images_per_class"] > 10


@pytest.mark.parametrize("geometry", [Geometry(2, 1, 28), Geometry(7, 3, 96), Geometry(10, 3, 256), Geometry(3, 3, 50)])
def test_the_solver_takes_other_shapes(geometry):
    sizes = budget.solve(geometry, 2)
    assert geometry.resolution % sizes["patch"] == 0
    J = (geometry.resolution // sizes["patch"]) ** 2
    assert J <= 256
    counted = sum(budget.speed_storage(sizes["images_per_class"] * geometry.classes, *(sizes[n] for n in "DKHRk"), J,
                                       sizes["patch"] ** 2 * geometry.channels).values())
    assert counted <= geometry.budget(2)


def test_the_solver_says_when_nothing_fits():
    with pytest.raises(ConfigError, match="no SPEED fits"):
        budget.solve(Geometry(2, 1, 8), 1)
