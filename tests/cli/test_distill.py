"""speedk distill and recipes, from folders of images to the file."""

from __future__ import annotations

import json
import os
import shlex
import signal

import pytest

import speedk
from speedk.cli import _progress, main


def distill(*arguments):
    return main(["distill", *map(str, arguments)])


def test_a_folder_becomes_a_file(folder, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert distill("--data", folder, "--recipe", recipe, "--ipc", 2, "--out", out, "--evaluate", "--seed", 3) == 0
    page = capsys.readouterr().out
    for words in ("split folder, 18 training and 6 test images of 3x16x16, 3 classes", "of 4,608 float32 numbers",
                  "dm: without a GPU trajectory matching", "an iteration and", "distilled.safetensors:", "preview.png",
                  "quick: 200 epochs", "evaluation.json", "seed 3"):
        assert words in page, words
    loaded = speedk.load(out / "distilled.safetensors")
    assert loaded.images().shape == (9, 3, 16, 16) and loaded.class_names == ["ant", "bee", "cat"]
    assert loaded.header["seed"] == 3 and "dm" in loaded.header["chosen"]
    assert json.loads((out / "evaluation.json").read_text())["protocol"]["name"] == "quick"

    assert distill("--data", folder, "--recipe", recipe, "--ipc", 2, "--out", out) == 1
    assert "already holds a run; say --resume" in capsys.readouterr().err
    before = (out / "distilled.safetensors").read_bytes()
    assert distill("--out", out, "--resume", "--data", folder) == 0
    assert (out / "distilled.safetensors").read_bytes() == before
    assert distill("--out", out, "--resume", "--data", folder, "k=5") == 1
    assert "k=6, not 5" in capsys.readouterr().err
    assert distill("--out", out, "--resume", "--data", folder, "--method", "pixels") == 1
    assert "method='speed', not 'pixels'" in capsys.readouterr().err


@pytest.mark.parametrize("also", [[], ["--dry-run"]])
def test_a_field_that_cannot_be_is_refused_first(also, tmp_path, capsys):
    assert distill("--method", "pixels", "init=nois", "--steps", 1, "--out", tmp_path / "run", *also) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "speedk: init='nois' is not one of real, noise\n")
    assert not (tmp_path / "run").exists()


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal after outer iteration `step`, as a user does."""
    told = _progress.Bars._step

    def and_stop(bars, done, *rest):
        told(bars, done, *rest)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(_progress.Bars, "_step", and_stop)


TM = ("batch=4", "inner_steps=3", "max_start=1", "expert_epochs=1", "expert_count=1", "expert_rate=0.1")


@pytest.mark.parametrize("objective", ["tm", "dm", "auto"])
def test_the_command_that_a_stopped_run_prints_ends_in_the_same_file(objective, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    words = ("--data", folder, "--objective", objective, "--method", "pixels", "--network", "mlp", "--steps", 4,
             "--device", "cpu", *(TM if objective == "tm" else ("batch=4",)))
    assert distill("--out", tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert distill("--out", tmp_path / "a run", *words) == 130
    page = capsys.readouterr().out
    command = shlex.split(page.strip().splitlines()[-1].partition("go on with: ")[2])
    assert command[:2] == ["speedk", "distill"] and main(command[1:]) == 0
    wanted = "dm: without a GPU" if objective == "auto" else f"{objective}, as asked"
    page = capsys.readouterr().out
    assert f"objective  {wanted}" in page and ("trajectory matching would take" in page) == (objective == "auto")
    whole, resumed = (tmp_path / run / "distilled.safetensors" for run in ("whole", "a run"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert speedk.load(whole).header["chosen"].startswith(wanted)


def test_sigterm_while_experts_train_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    signals = iter([signal.SIGTERM])  # one: who is told twice does not wait for what is being written
    monkeypatch.setattr(_progress.Bars, "_experts", lambda *_: [os.kill(os.getpid(), one) for one in signals])
    words = ("--data", folder, "--objective", "tm", "--method", "pixels", "--network", "mlp", "--steps", 1,
             *(word for word in TM if not word.startswith("expert_count")), "expert_count=3")
    assert distill("--out", tmp_path / "run", *words, "--device", "cpu") == 130
    assert "stopped before step 1: finished epochs of experts are kept; go on with: " in capsys.readouterr().out
    assert list((tmp_path / "cache").rglob("expert-0*.safetensors"))


def test_a_run_s_recipe_is_a_recipe(folder, recipe, tmp_path):
    words = ("--data", folder, "--steps", 1, "batch=5", "lr=0.02")
    assert distill("--recipe", recipe, "--ipc", 2, "--out", tmp_path / "first", *words) == 0
    assert distill("--recipe", tmp_path / "first/recipe.toml", "--data", folder, "--out", tmp_path / "again") == 0
    first, again = ((tmp_path / run / "distilled.safetensors").read_bytes() for run in ("first", "again"))
    assert first == again


def test_the_data_set_is_no_field(capsys):
    assert distill("data.name=cifar10") == 1
    assert "is said as --dataset cifar10" in capsys.readouterr().err


def test_fields_may_stand_between_options(folder, recipe, tmp_path):
    out = tmp_path / "run"
    assert distill("k=5", "--data", folder, "H=1", "--recipe", recipe, "--ipc", 2, "--out", out, "--steps", 1,
                   "D=4") == 0
    spec = speedk.load(out / "distilled.safetensors").synthetic.spec
    assert (spec.k, spec.H, spec.D) == (5, 1, 4)


def test_dry_run_says_what_it_would_take_and_leaves_nothing(folder, recipe, tmp_path, capsys):
    assert distill("--data", folder, "--recipe", recipe, "--ipc", 2, "--out", tmp_path / "run", "--dry-run") == 0
    page = capsys.readouterr().out
    for words in ("[parameterization]", "scm coordinates", "counted", "then 2 steps of", "GiB"):
        assert words in page, words
    assert not (tmp_path / "run").exists()


def test_minutes_stop_a_run_that_goes_on_to_the_same_file(folder, recipe, tmp_path, capsys):
    words = ("--data", folder, "--recipe", recipe, "--ipc", 2, "steps=3")
    assert distill(*words, "--out", tmp_path / "whole", "--minutes", 60) == 0
    assert "the minutes were over" not in capsys.readouterr().out
    assert distill(*words, "--out", tmp_path / "run", "--minutes", 1e-6) == 0
    page = capsys.readouterr().out
    assert "the minutes were over after 1 of 3 steps; go on with: speedk distill" in page
    assert speedk.load(tmp_path / "run" / "distilled.safetensors").header["objective"]["steps"] == 1
    command = shlex.split(page.partition("go on with: speedk ")[2].splitlines()[0])
    assert main(command) == 0
    whole, resumed = (tmp_path / run / "distilled.safetensors" for run in ("whole", "run"))
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_are_some(minutes, folder, tmp_path, capsys):
    assert distill("--data", folder, "--out", tmp_path / "run", f"--minutes={minutes}") == 1
    assert f"--minutes {minutes} " in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_dry_run_says_how_far_the_minutes_reach(folder, recipe, tmp_path, capsys):
    words = ("--data", folder, "--recipe", recipe, "--ipc", 2, "--out", tmp_path / "run", "--dry-run", "--minutes")
    assert distill(*words, 1e-6, "steps=1000") == 0
    assert "about 1 of these steps" in capsys.readouterr().out
    assert distill(*words, 1e6) == 0
    assert "of these steps" not in capsys.readouterr().out


def test_without_a_recipe_the_sizes_are_solved_for(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert distill("--data", folder, "--ipc", 3, "--out", out, "steps=1", "batch=4", "fit_steps=2") == 0
    assert "no recipe is shipped for this row" in capsys.readouterr().out
    loaded = speedk.load(out / "distilled.safetensors")
    assert sum(numbers for _, numbers, _ in loaded.storage()) <= 3 * 3 * 768


def test_pixels(folder, tmp_path):
    out = tmp_path / "run"
    assert distill("--data", folder, "--method", "pixels", "--ipc", 2, "--out", out, "steps=2", "batch=4") == 0
    assert speedk.load(out / "distilled.safetensors").images().shape == (6, 3, 16, 16)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dataset", "cifar11"], "did you mean 'cifar10'"),
    (["--method", "sped"], "did you mean 'speed'"),
    (["--objective", "tn"], "'tn' is not one of"),
    (["--recipe", "nothing"], "no recipe 'nothing'"),
    (["stepz=3"], "did you mean 'steps'"),
    (["images_per_class=9"], "over the budget: .* = 10,816 float32 numbers"),
    (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    (["k"], "'k' is not key=value"),
    (["rates.scm=1e45"], r"rates.scm=1e\+45 must be from 0 to 1e\+09"),
    (["lr=1e45"], r"lr=1e\+45 must be above 0 and at most 1e\+09"),
])
def test_one_line_for_each_mistake(arguments, message, tmp_path, capsys):
    import re

    assert distill(*arguments, "--out", tmp_path / "run") == 1
    _, err = capsys.readouterr()
    assert err.startswith("speedk: ") and err.count("\n") == 1 and re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_images_smaller_than_a_patch(folder, recipe, tmp_path, capsys):
    assert distill("--data", folder, "--recipe", recipe, "--ipc", 2, "patch=32", "--out", tmp_path / "run") == 1
    assert "patch=32 does not divide a resolution of 16" in capsys.readouterr().err


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    page = capsys.readouterr().out
    assert "cifar10-ipc1-speed" in page and "29,872" in page and "63.2 +- 0.1" in page
    ours = {line.split()[0] for line in page.splitlines() if line.endswith("settings ours")}
    assert {"tinyimagenet-ipc50-speed", "cifar100-ipc20-speed"} <= ours and "cifar10-ipc1-speed" not in ours
    assert main(["recipes", "show", "digits-ipc1-speed"]) == 0
    assert 'method = "speed"' in capsys.readouterr().out
    assert main(["recipes", "show", "digits-ipc1-sped"]) == 1
    assert "did you mean 'digits-ipc1-speed'" in capsys.readouterr().err
    assert main(["recipes", "list", "digits-ipc1-speed"]) == 1
    assert "speedk recipes show digits-ipc1-speed" in capsys.readouterr().err
    assert main(["recipes", "show"]) == 1
