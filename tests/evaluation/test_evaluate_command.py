"""The command `speedk evaluate`."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from speedk import data
from speedk.cli import _options
from speedk.cli import evaluate as command
from speedk.errors import ConfigError, DataError, TrainingError


@pytest.fixture
def run(real, monkeypatch):
    """A function that runs the command line given as text, on data that any name loads; it keeps what was asked for."""
    asked = []

    def load(name=None, path=None, **options):
        asked.append((name, path, options))
        return real

    monkeypatch.setattr(data, "load", load)

    def call(line: str) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args(line.split()))

    call.asked = asked
    return call


SHORT = "--networks mlp --runs 2 --protocol quick --epochs 2 --device cpu"


def test_a_file_gives_a_table_and_json_beside_it(run, real, write_artifact, capsys):
    path = write_artifact(real)
    assert run(f"{path} --dataset stripes {SHORT} --seed 3") == 0
    out = capsys.readouterr().out
    assert "stripes, split made up" in out and "seeds 3 4" in out
    stored = json.loads(path.with_name("evaluation.json").read_text())
    assert stored["results"][0]["seeds"] == [3, 4]
    assert run.asked == [("stripes", None, {"split": None, "resolution": 8, "normaliser": "channel"})]


def test_a_run_directory_is_the_file_in_it(run, real, write_artifact, tmp_path):
    path = write_artifact(real)
    assert run(f"{path.parent} --dataset stripes {SHORT}") == 0
    assert json.loads(path.with_name("evaluation.json").read_text())["source"] == str(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty is a folder without a distilled.safetensors"):
        run(f"{tmp_path / 'empty'} --dataset stripes {SHORT}")


def test_a_precision_is_said_in_the_report(run, real, write_artifact, capsys):
    path = write_artifact(real)
    assert run(f"{path} --dataset stripes {SHORT} --precision bf16") == 0
    assert "DSA, products in bf16" in capsys.readouterr().out
    assert json.loads(path.with_name("evaluation.json").read_text())["protocol"]["precision"] == "bf16"


def test_an_earlier_report_is_kept(run, real, write_artifact, capsys):
    path = write_artifact(real)
    for seed in (1, 2, 3):
        assert run(f"{path} --dataset stripes {SHORT} --seed {seed}") == 0
    kept = [json.loads(path.with_name(f"evaluation{part}.json").read_text())["seed"] for part in (".1", ".2", "")]
    assert kept == [1, 2, 3]
    assert "the earlier report is now" in capsys.readouterr().out


def test_a_file_finds_the_data_it_came_from(run, real, write_artifact, monkeypatch):
    path = write_artifact(real)
    with pytest.raises(DataError, match="distilled from 'stripes', which no data set is named: give its folder"):
        run(f"{path} {SHORT}")
    assert run(f"{path} --data somewhere {SHORT}") == 0
    monkeypatch.setattr(data, "names", lambda: ["stripes"])
    assert run(f"{path} {SHORT}") == 0
    assert [(name, path and str(path)) for name, path, _ in run.asked] == [(None, "somewhere"), ("stripes", None)]


def test_real_images_whole_sets_and_archives(run, real, tmp_path, capsys):
    assert run(f"--dataset stripes --real {SHORT}") == 0
    assert "one real image per class, drawn anew" in capsys.readouterr().out
    assert run(f"--dataset stripes --real 3 {SHORT} --out {tmp_path / 'r.json'}") == 0
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 9
    assert run(f"--dataset stripes --whole {SHORT}") == 0
    assert "whole (changed): 2 epochs" in capsys.readouterr().out
    np.savez(tmp_path / "a.npz", images=real.train.images[:6].numpy(), labels=real.train.labels[:6].numpy())
    assert run(f"{tmp_path / 'a.npz'} --dataset stripes {SHORT}") == 0
    assert (tmp_path / "evaluation.json").exists()


def test_a_report_that_cannot_be_written_is_refused_at_the_start(run, real, write_artifact, monkeypatch):
    path = write_artifact(real)

    def refuse(*_):
        raise TrainingError("cannot write: Permission denied")

    monkeypatch.setattr(_options, "check_writable", refuse)
    for words in (f"{path} --dataset stripes", f"--whole --dataset stripes --out {path.with_name('a.json')}"):
        with pytest.raises(TrainingError, match="Permission denied"):
            run(words)
    assert not run.asked


def test_a_failed_run_fails_the_command(run, real, write_artifact, capsys):
    with pytest.raises(TrainingError, match="2 of 2 runs failed"):
        run(f"{write_artifact(real)} --dataset stripes {SHORT} --rate 1e30")
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "message"), [
    ("", "give one of FILE, --whole and --real"),
    ("a.safetensors --whole", "give one of FILE"),
    ("--dataset stripes --corruptions a.safetensors", "--corruptions took a.safetensors: put FILE before it"),
    ("--whole", "say which data"),
    ("a.npz", "a.npz does not say what to test on"),
    ("--whole --dataset stripes --networks convnt", "did you mean 'convnet'"),
    ("--whole --dataset stripes --networks ,", "nothing to run"),
    ("--whole --dataset stripes --runs 0", "--runs 0"),
    ("--whole --dataset stripes --seed -1", "--seed -1 is negative"),
    ("--whole --dataset stripes --out nowhere/a.json", "nowhere is not a folder"),
])
def test_wrong_command_lines_are_refused_before_data_are_read(run, line, message):
    with pytest.raises(ConfigError, match=message):
        run(line)
    assert not run.asked
