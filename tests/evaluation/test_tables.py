"""The paper's tables: every cell is a run that can be, and the page says what the lines say."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speedk import networks, registry
from speedk.distillation import coresets, objectives
from speedk.distillation import recipe as recipes
from speedk.distillation.recipe import read, resolve, shipped
from speedk.errors import ConfigError, DataError
from speedk.evaluation.paper import published, tables

DOCS = Path(__file__).resolve().parents[2] / "docs"
ALL = tables.tables()
PAPER = {
    "1": [6706, 7644, 8291, 3754, 6571, 7970, 5881, 11315, 14884, 13054, 5902, 10327, 8881, 18294, 3119],
    "2": [35144, 4467, 38186, 46314, 16429],
    "3": [28158, 33169, 28535, 37068, 31628, 43381],
    "4": [5365, 4964, 4736, 5802],
    "5": [5778, 5841, 5802, 5248, 4371],
    "6": [1279, 1663, 1530],
    "7": [993, 1008, 968, 985],
    "8": [969, 996, 1008, 899],
    "9": [1040, 1013, 1008, 927],
    "10": [904, 1719],
    "I": [2472, 2407, 2145],
    "II": [2035, 1962, 676],
    "III": [2497, 2455, 2482, 2488, 2492, 2472],
    "V": [450, 2562, 1216, 2807],
}
"""Of each row as the paper prints it, in tenths: the sum of mean and deviation, times 1 for its first number, 2 for its
second, and so on. Summed up from the paper's text, not from ours."""
TARGETS = sorted({cell.target for found in ALL.values() for cell in found.cells
                  if cell.target and cell.published}, key=str)


def test_the_tables_are_the_papers():
    assert list(ALL) == list(PAPER)
    for found in ALL.values():
        assert len(found.cells) == len(found.rows) * len(found.columns)
        for cell in found.cells:
            ours = "without DSA" in cell.row or cell.row == "K-means"
            assert re.fullmatch(tables.UNPUBLISHED if ours else r"(\d+\.\d±\d\.\d)?", cell.published)
            assert cell.network in networks.names()
    assert sum(bool(re.match(r"\d", c.published)) for found in ALL.values() for c in found.cells) == 350


@pytest.mark.parametrize("name", list(PAPER))
def test_every_number_is_the_papers(name):
    rows = [[c.published for c in ALL[name].cells if c.row == row and c.published] for row in ALL[name].rows]
    tenths = [[sum(int(part.replace(".", "")) for part in number.split("±")) for number in row]
              for row in rows if tables.UNPUBLISHED not in row]
    assert [sum(place * value for place, value in enumerate(row, 1)) for row in tenths] == PAPER[name]


@pytest.mark.parametrize("target", TARGETS, ids=[target.folder for target in TARGETS])
def test_each_run_can_be(target):
    if target.kind == "coreset":
        assert target.name in registry.names(coresets)
    if target.kind == "recipe":
        assert target.name in shipped() and target.objective in registry.names(objectives)
        assert target.objective in read(target.name)["objective"]
        recipe = resolve(read(target.name), target.objective, dict(target.fields))
        for field in target.fields:  # one that is the recipe's own would make a second run of it
            rest = dict(other for other in target.fields if other != field)
            assert resolve(read(target.name), target.objective, rest) != recipe
        assert recipe.data.ipc == target.ipc and recipe.data.name == target.dataset
        spent = recipe.budget(recipes.geometry(recipe))
        assert (spent.counted > spent.allowed) == (recipe.data.budget == "off")


def test_the_recipes_say_the_same_numbers():
    cells = [c for name in ("1", "2", "10") for c in ALL[name].cells if c.target and c.published]
    for cell in cells:
        if cell.target.kind == "recipe":
            said = resolve(read(cell.target.name), "dm").about.published
            assert f"{cell.published.replace('±', ' +- ')} ({cell.target.objective})" in said


def test_the_recipes_store_as_many_images_as_the_paper_says():
    images = {name: read(name)["parameterization"]["images_per_class"] for name in shipped() if name.endswith("speed")}
    assert [images[f"cifar100-ipc{ipc}-speed"] for ipc in (1, 10, 50)] == [11, 62, 100]
    assert {n for name, n in images.items() if re.match("image[a-z]+-ipc1-", name)} == {15}
    assert {n for name, n in images.items() if re.match("image[a-z]+-ipc10-", name)} == {111}


def test_k_means_stands_beside_k_center():
    rows = ALL["1"].rows
    assert rows.index("K-means") == rows.index("K-Center") + 1
    cells = ALL["1"].select(["K-means"])
    assert [c.target.ipc for c in cells] == [1, 10, 50] * 3 and {c.target.name for c in cells} == {"kmeans"}


def test_selecting():
    found = ALL["3"].select(["dm WITH speed"], ["convnet, 1", "ViT, 1"])
    assert [(c.row, c.column, c.network) for c in found] == [
        ("DM with SPEED", "ConvNet, 1", "convnet"), ("DM with SPEED", "ViT, 1", "vit")]
    assert found[0].target == found[1].target
    assert {c.row for c in ALL["4"].select()} == {"SPEED"}
    for rows, message in ((["HaBa"], "another paper's method"), (["SPEDE"], "did you mean 'SPEED'")):
        with pytest.raises(ConfigError, match=message):
            ALL["4"].select(rows)
    with pytest.raises(ConfigError, match="has no number there"):
        ALL["1"].select(["DC"], ["TinyImageNet, 1"])
    assert tables.table("iii") == tables.table("III") == ALL["III"]
    for name in ("11", "IV", "Figure 2"):
        with pytest.raises(ConfigError, match=f"there is no table '{name}', only 1, .*III, V; docs/paper.md says"):
            tables.table(name)


def line(column="ConvNet", mean=50.04, **changes):
    return {"table": "4", "row": "SPEED", "column": column, "network": "convnet", "published": "73.5±0.2", "mean": mean,
            "std": 0.5, "runs": 5, "accuracies": [mean], "steps": 20000, "steps_of": 20000, "numbers": 306960,
            "budget": 307200, "distil_seconds": 120.0, "device": "CPU", "split": "official", "seed": 0,
            "version": "0.1.0", "commit": "abc", "date": "2026-01-01",
            "settings": {"init": "random", "sparse": "end", "norm": "branch", "standardise": True, "R": 1},
            "objective": "tm", "protocol": {"name": "paper", "standardisation": "speed", "epochs": 1001, "rate": 0.01},
            } | changes


def row_of(page, table, row):
    part = page.partition(f"## Table {table}:")[2].partition("## Table")[0]
    return next(text for text in part.splitlines() if text.startswith(f"| {row} |"))


def test_the_page_shows_what_was_run_and_what_was_not(tmp_path):
    path = tmp_path / "lines.jsonl"
    tables.append(path, [line()])
    rounded = line()["protocol"] | {"precision": "bf16"}
    tables.append(path, [line(), line("MLP", 30.0, steps=400, runs=2, changed={"batch": 64}, protocol=rounded)])
    lines = tables.read(path)
    assert len(lines) == 2
    page = tables.page(lines)
    assert row_of(page, 4, "SPEED") == ("| SPEED | 73.5±0.2 / **50.0±0.5** | 44.4±0.4 / **30.0±0.5**† | "
                                        "69.5±0.4 / not run | 51.5±0.3 / not run |")
    assert "| known to differ |" in page and "| 2026-01-01 | in nothing |" in page
    assert "| 400 of 20,000 steps, batch=64, evaluation in bf16, 2 networks |" in page
    assert row_of(page, 4, "HaBa").count("n/a") == 4 and row_of(page, 1, "KIP").endswith("| - | - | - | - |")
    assert page.count("Nothing of this table has been run yet.") == len(ALL) - 1
    tables.append(path, [line(mean=60.0)])
    assert "**60.0±0.5**" in tables.page(tables.read(path))


OWN = ["init=fit (random)", "sparse=always (end)"]
PROTOCOL = {"name": "paper", "standardisation": "mtt", "epochs": 1001, "rate": 0.01}
MTT = "protocol=mtt (speed)"


@pytest.mark.parametrize(("table", "row", "column", "changes", "said"), [
    ("4", "SPEED", "MLP", {}, [*OWN, "standardise=false (true)", MTT]),
    ("1", "SPEED", "CIFAR100, 1", {}, [*OWN, "norm=branch (sum)", "standardise=false (true)", MTT]),
    ("4", "SPEED", "MLP", {"changed": {"init": "random", "sparse": "end", "k": 24, "objective.batch": 32}},
     ["standardise=false (true)", "k=24", "objective.batch=32", MTT]),
    ("6", "R=1", "MLP", {}, [*OWN, "standardise=false (true)", MTT]),
    ("1", "TM", "CIFAR10, 1", {"steps": 5000, "steps_of": 5000}, []),
    ("1", "TM", "CIFAR100, 10", {"steps": 5000, "steps_of": 5000}, ["the original's tm goes without ZCA here"]),
    ("3", "DM", "ViT, 1", {"steps": 2000, "steps_of": 2000}, ["2,000 steps (20,000)"]),
    ("3", "DM", "ViT, 1", {"changed": {"steps": 20000}}, []),
    ("3", "DM", "ViT, 1", {"steps": 50, "steps_of": 2000}, ["50 of 2,000 steps (20,000)"]),
    ("3", "DM", "ViT, 1", {"changed": {"steps": 20000}, "protocol": PROTOCOL | {"rate": 0.03}},
     ["evaluation at rate=0.03 (0.01)"]),
    ("1", "TM", "CIFAR10, 1", {"steps": 5000, "steps_of": 5000, "protocol": PROTOCOL | {"rate": 0.0217}}, []),
    ("3", "DC", "ViT, 10", {"steps": 10000, "steps_of": 10000}, []),
    ("3", "DC", "ViT, 10", {"steps": 9, "steps_of": 9, "changed": {"steps": 9, "objective.batch": 64}},
     ["9 steps (10,000)", "batch=64 (256)"]),
    ("3", "DM with SPEED", "ViT, 1", {}, [*OWN, MTT, "settings of dm chosen here: none are published"]),
    ("10", "DM", "128x128", {"split": "fastai"}, ["batch=64 (256)", "split=fastai (ilsvrc)"]),
    ("2", "TM", "Fruit, 1", {"steps": 5000, "steps_of": 5000, "split": "ilsvrc"}, []),
    ("2", "TM", "Woof, 1", {"steps": 5000, "steps_of": 5000, "split": "ilsvrc"},
     ["settings of tm are the original's for ImageFruit"]),
    ("1", "Random", "CIFAR10, 1", {"steps": 0, "steps_of": 0, "split": "folder"}, ["split=folder (official)"]),
    ("1", "K-Center", "CIFAR10, 1", {"steps": 0, "steps_of": 0}, ["greedy, as the paper's can hardly be"]),
    ("1", "K-means", "CIFAR10, 1", {"steps": 0, "steps_of": 0}, []),
    ("1", "Herding", "CIFAR10, 1", {"steps": 0, "steps_of": 0, "changed": {"epochs": 8}}, ["epochs=8"]),
    ("1", "Random", "CIFAR10, 1", {"steps": 0, "steps_of": 0, "changed": {"epochs": 8}}, []),
    ("1", "Whole data set", "CIFAR10, 1", {"steps": 0, "steps_of": 0},
     ["training as chosen here: the paper's is not said"])])
def test_what_is_known_to_differ_is_said(table, row, column, changes, said):
    cell, = tables.table(table).select([row], [column])
    found = line(column, table=table, row=row, protocol=PROTOCOL)
    del found["settings"]  # as in the lines of earlier versions
    assert published.differences(cell.target, found | changes) == said
    for precise in (found | changes, found | changes | {"settings": published.settings(
            cell.target, changes.get("changed", {}))}):
        page = tables.page([precise])
        assert f"| {', '.join(said) or 'in nothing'} |" in page and ("**50.0±0.5**†" in page) == bool(said)


def test_the_command_of_the_published_run_is_that():
    command, = re.findall(r"^    (speedk reproduce .*)", (DOCS / "paper.md").read_text(), re.MULTILINE)
    changed = recipes.parse_overrides([word for word in command.split() if "=" in word])
    for found in ALL["1"].select(["SPEED"]):
        run = recipes.resolve(read(found.target.name), "tm", {**dict(found.target.fields), **changed})
        said = published.differences(found.target, {
            **line(split="ilsvrc" if found.target.data.startswith("image") else "official"), "changed": changed,
            "settings": published.settings(found.target, changed), "steps": run.objective.steps,
            "steps_of": run.objective.steps, "protocol": {"name": "paper", "standardisation": run.run.protocol}})
        assert said in ([], published._ours(found.target))


def test_a_line_keeps_the_settings_it_was_measured_with():
    cell, = ALL["3"].select(["DM with SPEED"], ["ViT, 1"])
    measured = {"results": [{"network": "vit", "mean": 1.0, "std": 0.0, "accuracies": [1.0] * 5, "measured": {}}],
                "changed": {"fit_steps": 9, "sparse": "end"}}
    assert tables.cell_line(cell, measured)["settings"] == {"init": "fit", "sparse": "end", "norm": "branch",
                                                            "steps": 2000, "batch": 256, "R": 1}
    assert published.differences(cell.target, line(settings={"init": "random", "sparse": "always"}))[0] == OWN[1]


def test_no_line_is_lost_where_several_are_written_at_once(tmp_path):
    path = tmp_path / "lines.jsonl"

    def write(number):
        for step in range(10):
            tables.append(path, [line(mean=float(number), steps=step)])
            tables.write_page(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert sorted((found["mean"], found["steps"]) for found in tables.read(path)) == [
        (float(number), step) for number in range(8) for step in range(10)]
    assert path.with_suffix(".md").read_text() == tables.page(tables.read(path))


def test_the_page_shows_the_gain_of_speed():
    def dm(row, column, mean, std=0.5, **changes):
        return line(column, mean, table="3", row=row, std=std, **({"objective": "dm"} | changes))

    higher = PROTOCOL | {"rate": 0.03}
    lines = [dm("DM", "ConvNet, 1", 30.0), dm("DM with SPEED", "ConvNet, 1", 39.9), dm("DM with SPEED", "MLP, 1", 20.0),
             dm("DM", "ViT, 1", 20.0), dm("DM with SPEED", "ViT, 1", 20.9), dm("DC", "ViT, 1", 20.0),
             dm("DC with SPEED", "ViT, 1", 19.0), dm("TM", "ViT, 1", None), dm("TM with SPEED", "ViT, 1", 19.0),
             dm("DC without DSA", "MLP, 1", 10.0), dm("DC without DSA with SPEED", "MLP, 1", 14.0),
             dm("DC", "MLP, 1", 10.0), dm("DC with SPEED", "MLP, 1", 10.5, protocol=higher),
             dm("TM", "MLP, 1", 10.0, objective="tm"),
             dm("TM with SPEED", "MLP, 1", 14.0, objective="tm", protocol=higher)]
    part = tables.page(lines).partition("## Table 3:")[2].partition("## Table")[0]
    assert part.partition("SPEED's gain")[2].splitlines()[2:] == [
        "| DC without DSA | MLP, 1 | unpublished | +4.0 |  |",
        "| DC | MLP, 1 | +6.5 | +0.5 | within the deviations, evaluated at rates of 0.01 and 0.03 |",
        "| DC | ViT, 1 | +2.3 | -1.0 | no gain |",
        "| DM | ConvNet, 1 | +18.5 | +9.9 |  |", "| DM | ViT, 1 | +7.9 | +0.9 | within the deviations |",
        "| TM | MLP, 1 | +23.7 | +4.0 |  |", ""]


def test_one_run_has_no_deviation():
    def alone(row, mean):
        return line("ResNet18, 1", mean, table="3", row=row, std=0.0, runs=1, accuracies=[mean])

    part = tables.page([alone("DM", 20.0), alone("DM with SPEED", 21.0)]).partition("## Table 3:")[2]
    assert "20.6±0.5 / **20.0 (one run)**" in part
    assert "| DM | ResNet18, 1 | +20.1 | +1.0 | of one run |" in part


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    for text in ("{}", "no", "[]", json.dumps({"table": "1"})):
        path.write_text(json.dumps(line()) + "\n" + text + "\n")
        with pytest.raises(DataError, match="line 2 of .* is not a measured cell"):
            tables.read(path)


def test_the_page_of_the_project_is_made_of_its_lines():
    assert (DOCS / "results.md").read_text() == tables.page(tables.read(DOCS / "results.jsonl"))
