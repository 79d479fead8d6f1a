"""speedk experts: made before they are needed, extended, described, and used by distill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from speedk import data
from speedk.cli import main
from speedk.distillation import experts
from speedk.distillation import recipe as recipes
from speedk.distillation.experts.folder import ExpertFolder

SMALL = ("--network", "mlp", "expert_batch=6", "expert_rate=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: two classes of 8 px, four training images and one test image each."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 1)):
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (8, 8, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def speedk(*arguments):
    return main([str(argument) for argument in arguments])


def test_experts_are_made_extended_and_described(folder, tmp_path, capsys):
    out = tmp_path / "experts"
    assert speedk("experts", "--data", folder, "--out", out, "--count", 2, "--epochs", 2, "--seed", 3, *SMALL) == 0
    page = capsys.readouterr().out
    for words in ("2 of mlp, ", "2 epochs at 0.1, batch 6, seed 3", "4 of 4 epochs, about"):
        assert words in page, words
    assert speedk("experts", "--data", folder, "--out", out, "--count", 3, "--epochs", 3, "--seed", 3, *SMALL) == 0
    assert "5 of 9 epochs" in capsys.readouterr().out
    assert speedk("experts", "info", out) == 0
    page = capsys.readouterr().out
    for words in ("3x8x8, 2 classes", "stored as float32", "plain SGD at 0.1, batch 6, DSA, seed 3", "epoch  experts"):
        assert words in page, words
    assert [line.split()[:2] for line in page.splitlines() if line.strip()[:1].isdigit()] == [
        ["0", "3"], ["1", "3"], ["2", "3"], ["3", "3"]]


def test_distill_says_what_experts_cost_and_uses_them(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    fields = ("expert_count=2", "max_start=2", "inner_steps=2", "batch=2", *SMALL)
    command = ("distill", "--data", folder, "--method", "pixels", "--objective", "tm", "--steps", 2, "--out",
               tmp_path / "run", *fields)
    assert speedk(*command, "--dry-run") == 0
    page = capsys.readouterr().out
    assert re.search(r"6 of 6 epochs are to be trained, [1-9.]+ MB of disk in all, about \d", page), page
    assert "2 steps of" in page
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert speedk("experts", "--data", folder, *fields) == 0
    assert "6 of 6 epochs" in capsys.readouterr().out
    assert speedk(*command) == 0
    assert "2 experts of 3 epochs from" in (page := capsys.readouterr().out) and "all are there" in page


@pytest.mark.parametrize("fields,epochs", [
    (("--ipc", 1), 11), ((), 11), (("--ipc", 10), 21), (("--recipe", "cifar10-ipc1-pixels"), 3), (("--ipc", 7), 41),
    (("--ipc", 1, "resolution=16"), 11),  # too small for the row's sizes, which experts have no use for
])
def test_a_rows_experts_have_the_epochs_that_speed_reads(folder, tmp_path, capsys, monkeypatch, fields, epochs):
    """Start epoch and target of any later `speedk distill`: 10 + 2 - 1 for CIFAR10 at one image per class."""
    load = data.load
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "load", lambda *_, resolution, **options: load(None, folder, resolution=resolution or 32))
    monkeypatch.setattr(experts, "train", lambda *_, **options: None)
    assert speedk("experts", "--dataset", "cifar10", "--count", 3, "--network", "mlp", *fields) == 0
    assert f"{3 * epochs} of {3 * epochs} epochs" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (("--dataset", "cifar10", "--network", "mlp"), "holds experts of digits, not cifar10: choose another folder"),
    (("--dataset", "digits", "--network", "convnet"), "holds experts of mlp, not convnet"),
    (("--dataset", "digits", "network=convnet"), "holds experts of mlp, not convnet"),
])
def test_experts_of_other_data_are_seen_before_the_data_are_read(tmp_path, capsys, monkeypatch, arguments, said):
    out = tmp_path / "experts"
    assert speedk("experts", "--out", out, "--count", 1, "--epochs", 1, *SMALL) == 0
    page = capsys.readouterr().out
    assert "1 of mlp, " in page and "1 epoch at 0.1" in page and "1 of 1 epoch, about" in page
    monkeypatch.setattr(data, "load", lambda *_, **options: pytest.fail("the data are read"))
    assert speedk("experts", "--out", out, *arguments) == 1
    assert said in capsys.readouterr().err


def test_no_recipe_of_a_row_reads_more_than_speeds():
    read = {}
    for name in recipes.shipped():
        recipe = recipes.resolve(recipes.read(name), "tm")
        if "tm" in recipes.read(name)["objective"]:
            read[recipe.data.name, recipe.data.ipc, recipe.method] = recipe.objective.epochs
    assert len(read) > 40
    assert all(epochs <= read[name, ipc, "speed"] for (name, ipc, _), epochs in read.items())


def test_it_is_said_where_experts_are_standardised(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    assert speedk("distill", "--data", folder, "--method", "pixels", "--objective", "tm", "--dry-run",
                  "protocol=speed", "inner_steps=2", "batch=2", "max_start=2", *SMALL) == 0
    page = capsys.readouterr().out
    assert "seed 0, protocol speed" in page and "experts of 3 epochs on standardised batches from" in page
    assert "standardise = true" in page
    assert speedk("experts", "--data", folder, "--out", tmp_path / "own", "--count", 1, "--epochs", 1, "protocol=speed",
                  *SMALL) == 0
    assert "batch 6, standardised, seed 0" in capsys.readouterr().out
    assert ExpertFolder.open(tmp_path / "own").identity.standardise


def test_what_cannot_be_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "experts"
    assert speedk("experts", "--data", folder, "--out", out, "--count", 1, "--epochs", 1, *SMALL) == 0
    capsys.readouterr()
    for arguments, said in (
        (("--data", folder, "--out", out, "--count", 1, "--epochs", 1, *SMALL[:2], "expert_batch=5"),
         "holds experts with rate=0.1, not 0.01"),
        (("--data", folder, "--precision", "bf16"), "--precision bf16 is for a folder of your own"),
        (("--data", folder, "--out", tmp_path / "never", "--epochs", "-3"), "--epochs -3 is nothing to train"),
        (("info",), "say which: speedk experts info DIR"),
        (("info", tmp_path / "nowhere"), "is no folder of experts"),
    ):
        assert speedk("experts", *arguments) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "never").exists()
    (out / "expert-0000.safetensors").write_bytes(b"junk")
    assert speedk("experts", "info", out) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("field,value", [("parameters", "x"), ("rate", None), ("normaliser", 3), ("augment", 1),
                                         ("batch", True), ("precision", "int8"), ("network", ["mlp"])])
def test_wrong_types_in_a_folder_are_one_line(folder, tmp_path, capsys, field, value):
    out = tmp_path / "experts"
    assert speedk("experts", "--data", folder, "--out", out, "--count", 1, "--epochs", 1, *SMALL) == 0
    capsys.readouterr()
    document = json.loads((out / "experts.json").read_text())
    document["identity"][field] = value
    (out / "experts.json").write_text(json.dumps(document))
    assert speedk("experts", "info", out) == 2
    error = capsys.readouterr().err
    assert f"is damaged ({field}=" in error and error.count("\n") == 1


def test_sigterm_keeps_every_finished_epoch(folder, tmp_path):
    out = tmp_path / "experts"
    command = ("experts", "--data", folder, "--out", out, "--count", 1, "--epochs", 100_000, *SMALL)
    script = ("import sys\nfrom speedk.cli import _progress, main\n"
              "def experts(done, *_):\n    if done == 3: print('three', flush=True)\n"
              "_progress.Bars.progress = lambda self: type('', (), {'experts': staticmethod(experts)})\n"
              "sys.exit(main(sys.argv[1:]))\n")
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, command)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while (line := process.stdout.readline()) != "three\n":
        assert line, process.stderr.read()
    assert not (out / "expert-0000.safetensors").exists()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; every finished epoch is in" in error.splitlines()[-1]
    assert ExpertFolder.open(out).epochs(0) >= 3
