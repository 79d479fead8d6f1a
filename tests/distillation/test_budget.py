"""Eq. 7 for the ten published rows, and the solver for rows that are not published."""

import published
import pytest

from speedk.distillation import budget
from speedk.distillation import recipe as recipes
from speedk.errors import ConfigError
from speedk.geometry import Geometry


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: row.recipe)
def test_the_published_rows(row):
    N = row.images * row.geometry.classes
    assert sum(budget.speed_storage(N, row.D, row.K, row.H, row.R, row.k, row.J, row.L).values()) == row.counted
    assert row.geometry.budget(row.ipc) == row.budget
    assert row.counted <= row.budget and row.D // row.H <= row.K and row.k / (row.J * row.K) < 0.05
    assert 0.69 < row.penalty / (0.064 / (N * row.H * row.J)) < 2.61  # the paper's rule


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


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: row.recipe)
def test_the_solver_keeps_the_papers_rules(row):
    sizes = budget.solve(row.geometry, row.ipc)
    assert row.geometry.resolution // sizes["patch"] == row.J**0.5
    N, L = sizes["images_per_class"] * row.geometry.classes, sizes["patch"] ** 2 * row.geometry.channels
    counted = sum(budget.speed_storage(N, *(sizes[n] for n in "DKHRk"), row.J, L).values())
    assert 0.9 * row.budget < counted <= row.budget
    assert sizes["D"] // sizes["H"] <= sizes["K"] and sizes["k"] / (row.J * sizes["K"]) < 0.05
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
