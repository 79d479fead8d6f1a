"""speedk sweep: the grid, its cells, what is skipped and what goes on."""

from __future__ import annotations

import functools
import json

import pytest

import speedk
from speedk.cli import main, sweep
from speedk.distillation import loop
from speedk.errors import ConfigError
from speedk.evaluation import cell


@pytest.fixture
def run(folder, recipe, tmp_path, monkeypatch):
    """Sweep the folder's images at 2 images a class into `grid`, tested by one MLP for an epoch."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", folder, "--recipe", recipe, "--ipc", 2, "--out", "grid", "--networks", "mlp", "--runs", 1,
              "--epochs", 1, "--objective", "dm"]
    return lambda *words: main(["sweep", *map(str, [*common, *words])])


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "grid/sweep.jsonl").read_text().splitlines()]


def test_a_grid_is_run_once_and_drawn(run, tmp_path, capsys, monkeypatch):
    assert run("k=2,6", "R=1") == 0
    page = capsys.readouterr().out
    assert "2 cells of custom with R=1" in page and "sweep.png" in page and "of budget" in page
    found = lines(tmp_path)
    assert [line["fields"] for line in found] == [{"k": 2, "R": 1}, {"k": 6, "R": 1}]
    for line, k in zip(found, (2, 6)):
        loaded = speedk.load(tmp_path / f"grid/k={k}/distilled.safetensors")
        assert loaded.header["spec"]["k"] == k and line["checksum"] == loaded.fingerprint
        assert line["numbers"] == loaded.header["numbers"] and (line["steps"], line["steps_of"]) == (2, 2)
        assert line["results"][0]["network"] == "mlp" and len(line["results"][0]["accuracies"]) == 1
    assert (tmp_path / "grid/sweep.png").read_bytes().startswith(b"\x89PNG")

    def never(*_, **__):
        raise AssertionError("a finished cell ran again")

    monkeypatch.setattr(loop, "distill", never)
    assert run("k=2,6", "R=1") == 0
    assert capsys.readouterr().out.count("finished before") == 2 and lines(tmp_path) == found


def test_a_stopped_grid_goes_on_and_a_longer_one_keeps_its_cells(run, tmp_path, monkeypatch):
    step, calls = loop.Run.advance, []

    def stop(self):
        calls.append(self.recipe.parameterization.k)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Run, "advance", stop)
    assert run("k=2,6") == 130
    assert calls == [2, 2, 6, 6] and len(lines(tmp_path)) == 1
    assert run("k=2,6,4") == 0
    assert set(calls[4:]) == {4, 6} and [line["fields"]["k"] for line in lines(tmp_path)] == [2, 6, 4]
    before = len(calls)
    assert run("k=2,6", "--runs", 2) == 0  # evaluated anew, not distilled anew
    assert len(calls) == before and len(lines(tmp_path)[0]["results"][0]["accuracies"]) == 2


def test_where_a_cell_fails_the_others_are_run_and_it_is_named(run, tmp_path, capsys, monkeypatch):
    assert run("rates.scm=1e9,0.01", "steps=5", "schedule=constant") == 1
    said = capsys.readouterr()
    assert [line["fields"]["rates.scm"] for line in lines(tmp_path)] == [0.01]
    first, last = (text for text in said.err.splitlines() if text.startswith("speedk: "))
    assert first.startswith("speedk: rates.scm=1000000000.0: ") and "the outer rates are too high" in first
    assert last == "speedk: 1 of 2 cells failed: rates.scm=1000000000.0"
    assert "rates.scm=0.01 " in said.out.partition("of budget")[2] and (tmp_path / "grid/sweep.png").exists()

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(loop, "distill", no_memory)  # of what is not finished
    assert run("rates.scm=1e9,0.01", "steps=5", "schedule=constant") == 1
    said = capsys.readouterr()
    assert f"1000000000.0: out of memory: {sweep.LOWER}\n" in said.err and "0.01: finished before" in said.out
    monkeypatch.setattr(sweep, "_table", None)  # there is none without a line
    assert run("k=2,6") == 1
    assert capsys.readouterr().err.endswith("speedk: 2 of 2 cells failed: k=2; k=6\n")

    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "distill", bug)
    assert run("k=2,6") == 70
    assert "a bug in speedk" in capsys.readouterr().err


def test_networks_that_did_not_train_are_a_failure(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cell, "evaluate", functools.partial(cell.evaluate, rate=1e30))
    assert run("k=2,6", "--epochs", 3) == 1
    assert capsys.readouterr().err.endswith("\nspeedk: 2 of 2 cells failed: k=2; k=6\n") and len(lines(tmp_path)) == 2


def test_a_precision_is_that_of_its_networks(run, tmp_path, capsys):
    assert run("k=2,6", "--precision", "bf16") == 0
    assert "protocol quick in bf16" in capsys.readouterr().out
    assert [line["protocol"]["precision"] for line in lines(tmp_path)] == ["bf16", "bf16"]
    assert run("k=2,6") == 0  # the other one is measured for itself
    assert [line["protocol"]["precision"] for line in lines(tmp_path)] == ["float32", "float32"]


def test_a_cell_over_the_budget_needs_to_be_allowed(run, tmp_path, capsys):
    assert run("k=6,40", "images_per_class=25") == 1
    said = capsys.readouterr().err
    assert "k=40,images_per_class=25: over the budget" in said and "budget=off" in said
    assert not (tmp_path / "grid").exists()
    assert run("k=6,40", "images_per_class=25", "budget=off", "--dry-run") == 0
    assert "over" in capsys.readouterr().out and not (tmp_path / "grid").exists()


def test_a_grid_is_extended_by_a_cell_over_the_budget(run, tmp_path, capsys, monkeypatch):
    seen, distill = [], loop.distill

    def watch(recipe, *given, **how):
        seen.append(recipe.parameterization.k)
        return distill(recipe, *given, **how)

    def stored(k):
        return speedk.load(tmp_path / f"grid/k={k}/distilled.safetensors").header["budget_off"]

    monkeypatch.setattr(loop, "distill", watch)
    assert run("k=2,6", "images_per_class=25") == 0
    assert run("k=2,6,40", "images_per_class=25", "budget=off") == 0
    assert seen == [2, 6, 40] and [stored(k) for k in seen] == [False, False, True]
    assert [line["fields"]["k"] for line in lines(tmp_path)] == seen

    # As earlier versions began all cells of a grid with the budget off.
    monkeypatch.setattr(sweep, "_within", lambda planned: planned)
    assert run("k=4,40", "images_per_class=25", "budget=off") == 0
    assert stored(4)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for words in (["budget=off"], []):
        assert run("k=2,4,6", "images_per_class=25", *words) == 0
    assert stored(4)


def test_sweeps_that_differ_in_what_is_fixed_go_to_other_folders(folder, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def out(*words, of=("--data", str(folder), "--recipe", str(recipe))):
        assert main(["sweep", "k=2,6", *of, "--objective", "dm", "--dry-run", *words]) == 0
        return capsys.readouterr().out.partition("\nout ")[2].split()[0]

    assert out() == "runs/sweep-custom-dm-k"
    assert out("steps=3") == out("--steps", "3") == "runs/sweep-custom-dm-k-steps=3"
    assert out("R=1", "--ipc", "2", "--seed", "4") == "runs/sweep-custom-dm-k-R=1-ipc=2-seed=4"
    assert out("--ipc", "1", of=("--dataset", "digits")) == "runs/sweep-digits-ipc1-speed-dm-k"  # the name has it
    assert out("budget=off") == "runs/sweep-custom-dm-k"  # so that it goes on with the cells that fit
    assert len(out(f"preview_every={'1' * 300}")) <= 205


@pytest.mark.parametrize(("words", "message"), [
    (["k=3"], "give a field and the values it shall take"),
    ([], "give a field and the values"),
    (["k=2,"], "'k=2,' is not key=a,b,c"),
    (["k=2,3", "k=4"], "k is given twice"),
    (["k=2,2"], "'k=2,2' has a value twice"),
    (["kk=2,3"], "no recipe field 'kk'"),
    (["k=2,3", "--networks", "mpl"], "did you mean 'mlp'"),
    (["k=2,3", "--runs", "0"], "there is nothing to run"),
    (["k=2,3", "--epochs", "0"], "epochs=0 must be at least 1"),
    (["steps=3,4", "--steps", "3"], "steps=4: --steps 3 and steps=4 do not agree"),
    (["objective.steps=3,4", "--steps", "3"], "--steps 3 and objective.steps=4 do not agree"),
    (["k=2,3", "seed=1", "--seed", "2"], "--seed 2 and seed=1 do not agree"),
    (["ipc=3,4"], "--ipc 2 and ipc=3 do not agree"),
    (["k=2,3", "network=mlp", "--network", "convnet"], "--network convnet and network=mlp do not agree"),
    (["k=2,3", "parameterization.k=2"], "parameterization.k=2 and k=3 do not agree"),
])
def test_one_line_for_each_mistake(run, capsys, words, message):
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_grid_varies_its_last_field_fastest():
    assert sweep._grid(["a=1,2", "b=x", "c=0.5,1e-3"]) == [
        {"a": 1, "b": "x", "c": 0.5}, {"a": 1, "b": "x", "c": 1e-3},
        {"a": 2, "b": "x", "c": 0.5}, {"a": 2, "b": "x", "c": 1e-3}]
    with pytest.raises(ConfigError):
        sweep._grid(["a=1"])


def test_without_matplotlib_the_numbers_are_there(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert run("k=2,6") == 0
    assert 'pip install "speedk[plots]"' in capsys.readouterr().out and len(lines(tmp_path)) == 2
    assert not (tmp_path / "grid/sweep.png").exists()


def drawn(monkeypatch, fields, numbers):
    """What is given to the plot for one MLP's results of cells with these fields."""
    from types import SimpleNamespace

    from speedk.evaluation import plots

    lines = [{"fields": of_cell, "numbers": count, "results": [{"network": "mlp", "mean": 10.0 + i, "std": 1.0}]}
             for i, (of_cell, count) in enumerate(zip(fields, numbers))]
    recipe = SimpleNamespace(about=SimpleNamespace(name="mine"), objective_name="dm")
    seen = []
    monkeypatch.setattr(plots, "against", lambda *arguments: seen.append(arguments) or b"")
    sweep._picture(lines, sweep._varied(fields), SimpleNamespace(recipe=recipe))
    return seen[0]


def test_words_are_curves_and_numbers_are_points(monkeypatch):
    fields = [{"k": k, "sparsify": how} for k in (16, 32) for how in ("global", "local")]
    points, axis, _ = drawn(monkeypatch, fields, [100, 100, 200, 200])
    assert axis == "counted float32 numbers" and points == {
        "mlp, sparsify=global": [(100, 10.0, 1.0, "k=16"), (200, 12.0, 1.0, "k=32")],
        "mlp, sparsify=local": [(100, 11.0, 1.0, "k=16"), (200, 13.0, 1.0, "k=32")]}


def test_a_field_that_costs_no_storage_is_the_axis(monkeypatch):
    points, axis, _ = drawn(monkeypatch, [{"penalty": 1e-7}, {"penalty": 1e-6}], [100, 100])
    assert axis == "penalty" and points == {"mlp": [(1e-7, 10.0, 1.0, ""), (1e-6, 11.0, 1.0, "")]}


def test_accuracy_against_time(run, tmp_path, capsys, monkeypatch):
    from speedk.evaluation import plots

    against, seen = plots.against, []
    monkeypatch.setattr(plots, "against", lambda *given: seen.append(given) or against(*given))
    assert run("steps=1,2") == 0
    assert "time.png" in capsys.readouterr().out and (tmp_path / "grid/time.png").read_bytes().startswith(b"\x89PNG")
    found = lines(tmp_path)
    assert seen[1][0] == {"mlp": [(line["distil_seconds"], line["results"][0]["mean"], line["results"][0]["std"], steps)
                                  for line, steps in zip(found, "12", strict=True)]}
    assert "seconds of distilling on CPU" in seen[1][1] and "IPC 2, dm" in seen[1][2]
    seen.clear()
    (tmp_path / "other").mkdir()
    for line in found:
        line["distil_seconds"] += 100
    other = tmp_path / "other/sweep.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in found))
    assert run("k=2,6", "--compare", other) == 0
    assert set(seen[1][0]) == {"grid, mlp, k=2", "grid, mlp, k=6", "other, mlp"}
    assert [point[0] for point in seen[1][0]["other, mlp"]] == [line["distil_seconds"] for line in found]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fields": {}}', '{"fields": 3, "device": "CPU", "steps": 1}'])
def test_what_is_no_sweep_is_not_compared(run, tmp_path, capsys, content):
    path = tmp_path / "sweep.jsonl"
    path.write_text(content)
    assert run("k=2,6", "--compare", path) == 1
    assert "is not the sweep.jsonl of a sweep" in capsys.readouterr().err and not (tmp_path / "grid").exists()
    path.unlink()
    assert run("k=2,6", "--compare", path) == 1
    assert "cannot read" in capsys.readouterr().err


def test_without_steps_there_is_no_picture_of_time(run, tmp_path):
    assert run("k=2,6") == 0
    assert (tmp_path / "grid/sweep.png").exists() and not (tmp_path / "grid/time.png").exists()
