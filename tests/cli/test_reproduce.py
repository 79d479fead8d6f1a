"""speedk reproduce, on a table of its own whose runs are small."""

from __future__ import annotations

import functools
import json
import time
from types import SimpleNamespace

import pytest

import speedk
from speedk.cli import main, reproduce
from speedk.distillation import loop
from speedk.distillation import plan as plans
from speedk.errors import Interrupted, TrainingError
from speedk.evaluation import cell
from speedk.evaluation.paper import tables


@pytest.fixture
def run(tmp_path, monkeypatch):
    found = {"title": "Digits", "common": {"data": "digits", "ipc": 1},
             "columns": [{"name": "MLP", "network": "mlp"}],
             "rows": [{"name": "Random", "coreset": "random", "published": "50.0±1.0"},
                      {"name": "DM", "method": "pixels", "objective": "dm", "published": "60.0±1.0"},
                      {"name": "TM", "method": "pixels", "objective": "tm", "published": "65.0±1.0"},
                      {"name": "Whole", "whole": True, "published": "95.0±1.0"},
                      {"name": "Other", "published": "70.0±1.0"}]}
    monkeypatch.setattr(tables, "tables", lambda: {"T": tables._table("T", found)})
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["reproduce", *words])


def lines(tmp_path):
    return [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_rows_are_run_once_and_written_down(run, tmp_path, capsys, monkeypatch):
    small = ["--protocol", "quick", "--runs", "2"]
    assert run("T", "--row", "random", *small) == 0
    assert run("T", "--row", "Whole", "--runs", "1") == 0
    assert run("T", "--row", "DM", "steps=2", "batch=4", *small) == 0
    page = capsys.readouterr().out
    assert "speedk coreset --dataset digits --ipc 1 --method random" in page
    assert "speedk distill --recipe digits-ipc1-pixels --objective dm steps=2 batch=4" in page
    found = lines(tmp_path)
    assert [line["row"] for line in found] == ["Random", "Whole", "DM"]
    random, whole, matched = found
    assert random["numbers"] == matched["numbers"] == 10 * 1024 and whole["numbers"] == 1438 * 1024
    assert matched["changed"] == {"steps": 2, "batch": 4} and (matched["steps"], matched["steps_of"]) == (2, 2)
    assert whole["mean"] > 80 > random["mean"] and len(matched["accuracies"]) == 2
    assert "**" in (tmp_path / "results.md").read_text() and "70.0±1.0 / n/a" in (tmp_path / "results.md").read_text()

    monkeypatch.setattr(loop, "distill", None)  # nothing is distilled again
    assert run("T", "--row", "DM", "batch=4", "steps=2", *small) == 0
    assert len(lines(tmp_path)) == 3
    assert run() == 0
    assert "not part of speedk" in capsys.readouterr().out


def test_where_a_run_fails_the_others_are_run_and_it_is_named(run, tmp_path, capsys, monkeypatch):
    seen = []

    def distill(recipe, *_, **__):
        seen.append((tmp_path / "results.md").read_text().count("**"))  # what came before is on the page
        raise {"dm": TrainingError("the loss is nan at step 3"), "tm": MemoryError}[recipe.objective_name]

    monkeypatch.setattr(loop, "distill", distill)
    words = ["T", "--row", "Random", "--row", "DM", "--row", "TM", "--protocol", "quick", "--runs", "1"]
    assert run(*words) == 1
    assert seen == [4, 4] and [line["row"] for line in lines(tmp_path)] == ["Random"]  # two stars are in its head
    said = capsys.readouterr().err.splitlines()
    assert said == ["speedk: DM (MLP): the loss is nan at step 3",
                    f"speedk: TM (MLP): out of memory: {reproduce.LOWER}",
                    "speedk: 2 of 3 runs failed: DM (MLP); TM (MLP)"]
    assert run("T", "--row", "DM") == 1
    assert capsys.readouterr().err == "speedk: the loss is nan at step 3\n"

    def stopped(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "results.md").unlink()
    monkeypatch.setattr(loop, "distill", stopped)
    assert run(*words) == 130
    assert capsys.readouterr().err == "speedk: interrupted; the same command goes on\n"
    assert (tmp_path / "results.md").read_text().count("**") == 4


def test_networks_that_did_not_train_are_a_failure(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cell, "evaluate", functools.partial(cell.evaluate, rate=1e30))
    assert run("T", "--row", "Random", "--protocol", "quick", "--runs", "1") == 1
    assert capsys.readouterr().err == "speedk: 1 of 1 runs failed: Random (MLP)\n"
    assert "**failed**" in (tmp_path / "results.md").read_text()


def test_what_the_minutes_did_not_reach_goes_on(run, tmp_path, capsys):
    words = ["T", "--row", "DM", "steps=3", "batch=4", "--protocol", "quick", "--runs", "1"]
    assert run(*words, "--budget", "1e-6") == 0
    assert "after 1 of 3 steps" in capsys.readouterr().out
    assert "1 of 3 steps" in (tmp_path / "results.md").read_text()
    assert run(*words) == 0
    assert [line["steps"] for line in lines(tmp_path)] == [1, 3]
    assert lines(tmp_path)[1]["distil_seconds"] > lines(tmp_path)[0]["distil_seconds"]


def test_the_minutes_are_for_the_runs_that_need_them(run, tmp_path, monkeypatch):
    """Each run that is left has its share, and what one leaves is for the others; a coreset and the whole data set have
    none."""
    made = plans.plan(recipe="digits-ipc1-pixels", objective="dm", overrides={"steps": 1, "batch": 4},
                      out=tmp_path / "runs/tables/digits-ipc1-pixels-dm-batch=4-steps=1-seed0")
    given, clock = [], [0.0]

    def distil(self, *, minutes, **how):
        given.append((self.recipe.objective_name, minutes))
        self.out.mkdir(parents=True, exist_ok=True)
        clock[0] += 60.0
        raise TrainingError("it diverged")

    def none(*_, **__):
        raise TrainingError("there is none")

    real_run = plans.Plan.run
    monkeypatch.setattr(plans.Plan, "run", distil)
    monkeypatch.setattr(cell, "measure_coreset", none)
    monkeypatch.setattr(cell, "measure_whole", none)
    monkeypatch.setattr(cell, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))
    assert run("T", "--budget", "6") == 1
    assert given == [("dm", 3.0), ("tm", 5.0)]
    rows = ["T", "--row", "DM", "--row", "TM", "steps=1", "batch=4"]
    assert run(*rows, "--budget", "1.5") == 1
    assert given[2:] == [("dm", 0.75), ("tm", 0.5)]
    real_run(made)
    assert run(*rows, "--budget", "6") == 1
    assert given[5:] == [("tm", 6.0)]  # the other one is finished, and is to be evaluated
    assert run(*rows) == 1
    assert given[6:] == [("dm", None), ("tm", None)]


def test_what_is_changed_is_what_is_run(run, tmp_path, capsys):
    words = ["T", "--row", "DM", "steps=1", "batch=4", "resolution=16", "normaliser=zca", "seed=3", "protocol=speed"]
    assert run(*words, "--protocol", "quick", "--runs", "1") == 0
    assert capsys.readouterr().out.count("--seed 3") == 1
    path, = tmp_path.glob("runs/tables/*-seed3/distilled.safetensors")
    loaded = speedk.load(path)
    assert (loaded.header["normaliser"]["kind"], loaded.header["seed"], loaded.geometry.resolution) == ("zca", 3, 16)
    line, = lines(tmp_path)
    assert (line["seed"], line["resolution"], line["protocol"]["standardisation"]) == (3, 16, "speed")
    assert "seed" not in line["changed"]  # of which there is a column
    assert json.loads(path.with_name("data.json").read_text())["split"] == line["split"]


def test_the_protocol_of_rows_without_a_recipe(run, tmp_path, capsys):
    words = ["T", "--row", "Random", "protocol=speed", "--protocol", "quick", "--runs", "1"]
    assert run(*words) == 0
    assert lines(tmp_path)[0]["protocol"]["standardisation"] == "speed"
    capsys.readouterr()
    assert run("T", "--row", "Random", "--row", "Whole", "protocol=speed", "--dry-run") == 0
    coreset, whole = capsys.readouterr().out.splitlines()
    out = "runs/tables/digits-ipc1-random-protocol=speed-seed0"
    assert coreset == (f"speedk coreset --dataset digits --ipc 1 --method random --out {out} && "
                       f"speedk evaluate {out} --networks mlp --standardisation speed")
    assert (tmp_path / out / "distilled.safetensors").exists()
    assert whole == "speedk evaluate --whole --dataset digits --networks mlp --standardisation speed"


def test_experts_count_as_distilling(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    small = ["steps=1", "batch=4", "inner_steps=2", "max_start=1", "expert_epochs=1", "expert_count=2", "network=mlp",
             "expert_batch=512"]
    assert run("T", "--row", "TM", *small, "--budget", "1e-6") == 0
    assert "1 of 2 epochs of experts, which are kept; nothing is measured yet" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()
    assert run("T", "--row", "TM", *small, "--protocol", "quick", "--runs", "1") == 0
    assert lines(tmp_path)[0]["objective"] == "tm"
    experts, = (tmp_path / "cache" / "experts").iterdir()
    assert run("T", "--row", "TM", *small, "--protocol", "quick", "--runs", "1", f"objective.experts={experts}") == 0
    assert all(line["changed"].keys() == {word.split("=")[0] for word in small} for line in lines(tmp_path))
    assert str(tmp_path) not in (tmp_path / "results.jsonl").read_text() + (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("command", [
    ["reproduce", "T", "--row", "DM"],
    ["sweep", "--recipe", "digits-ipc1-pixels", "--objective", "dm", "lr=0.01,0.1"],
])
def test_a_run_that_is_stopped_says_how_it_goes_on(run, capsys, monkeypatch, command):
    def stopped(*_, **__):
        raise Interrupted("stopped at step 1 of 2, all of it saved in there")

    monkeypatch.setattr(loop, "distill", stopped)
    assert main(command) == 130
    said = capsys.readouterr().err
    assert said == "speedk: stopped at step 1 of 2, all of it saved in there; the same command goes on\n"


@pytest.mark.parametrize(("words", "message"), [
    (["X"], "there is no table 'X', only T"),
    (["T", "--row", "Randm"], "did you mean 'Random'"),
    (["T", "--row", "Other"], "another paper's method"),
    (["T", "T"], "one table at a time"),
    (["T", "k=3"], "k=... changes a recipe"),
    (["T", "--row", "DM", "kk=3", "--dry-run"], "no recipe field 'kk'"),
    (["T", "--row", "DM", "batch=x", "--dry-run"], "batch='x' must be a whole number"),
    (["T", "--row", "DM", "images_per_class=2", "--dry-run"], "no recipe field 'images_per_class'"),
    (["T", "--row", "DM", "network=mpl", "--dry-run"], "did you mean 'mlp'"),
    (["T", "--row", "DM", "ipc=2"], "ipc is not to be changed here"),
    (["T", "--row", "DM", "seed=3", "--seed", "4"], "the seeds 3 and 4 do not agree"),
    (["T", "--row", "DM", "seed=x"], "seed=x is not from 0"),
    (["T", "--row", "DM", "--seed", "-1"], "seed=-1 is not from 0"),
    (["T", "--row", "DM", "batch=3", "batch=4"], "batch is given twice"),
    (["T", "--row", "DM", "split=ilsvrc", "steps=1"], "split 'ilsvrc' is not one that can be asked for"),
    (["T", "--row", "Whole", "epochs=3"], "of the whole data set: split, protocol"),
    (["T", "--row", "Whole", "normaliser=zca"], "normaliser=... changes a recipe"),
    (["T", "--row", "Random", "protocol=sped"], "protocol='sped' is not one of mtt, speed"),
    (["T", "--row", "Random", "split=fastai"], "split 'fastai' is not one that can be asked for"),
    (["T", "--row", "Random", "k=3"], "of a coreset: epochs=N"),
    (["T", "--row", "Random", "epochs=0"], "epochs=0 must be a whole number"),
    (["T", "--budget", "0"], "--budget 0 must be above 0"),
    (["T", "--budget", "nan"], "--budget nan must be above 0"),
    (["T", "--budget", "inf"], "--budget inf is no limit"),
    (["T", "--runs", "0"], "--runs 0 must be at least 1"),
    (["T", "--results", "a.md"], "the page is written beside it"),
    (["T", "--results", "no/a.jsonl"], "create it first"),
])
def test_one_line_for_each_mistake(run, capsys, words, message):
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_dry_run_prints_the_commands(run, tmp_path, capsys):
    assert run("T", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "speedk coreset --dataset digits --ipc 1 --method random",
        "speedk distill --recipe digits-ipc1-pixels --objective dm",
        "speedk distill --recipe digits-ipc1-pixels --objective tm",
        "speedk evaluate --whole --dataset digits --networks mlp"]
    assert run("T", "--row", "Random", "epochs=3", "--dry-run") == 0
    assert capsys.readouterr().out == "speedk coreset --dataset digits --ipc 1 --method random --epochs 3\n"
    assert not list(tmp_path.iterdir())


def test_a_value_with_a_slash_makes_no_folders(run, tmp_path, monkeypatch):
    outs = []

    def planned(*, out, **_):
        outs.append(out)
        raise TrainingError("not now")

    monkeypatch.setattr(plans, "plan", planned)
    assert run("T", "--row", "TM", "experts=/a/b") == 1
    assert [str(out) for out in outs] == ["runs/tables/digits-ipc1-pixels-tm-experts=_a_b-seed0"]


def test_a_coreset_by_other_epochs(run, tmp_path):
    assert run("T", "--row", "Random", "epochs=3", "--protocol", "quick", "--runs", "1") == 0
    assert lines(tmp_path)[0]["changed"] == {"epochs": 3}
    assert "epochs=3" not in (tmp_path / "results.md").read_text()  # of a network that random images do not need
