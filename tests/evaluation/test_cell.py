"""A cell of a table: what its clock counts, and what is measured once."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from stripes import make_real

from speedk.data import zca
from speedk.evaluation import cell
from speedk.evaluation.paper import tables
from speedk.evaluation.record import Record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))


def how(*networks: str, **options) -> cell.Evaluation:
    return cell.Evaluation(networks or ("mlp",), **{"runs": 1, "epochs": 1, **options})


def test_the_clock_does_not_count_what_the_data_need(tmp_path, monkeypatch):
    real = make_real()
    normaliser = zca.fit(real.train.images, real.fingerprint, progress=False)
    real = make_real(normaliser=normaliser)
    clock, whiten = [0.0], normaliser.normalise

    def slow(images):
        clock[0] += 100.0
        return whiten(images)

    monkeypatch.setattr(normaliser, "normalise", slow)
    monkeypatch.setattr(cell, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))
    line = cell.measure_coreset(real, "random", 1, how(), tmp_path, bars=False)
    assert clock[0] >= 100 and line["distil_seconds"] == 0


def test_the_network_of_a_coreset_shows_its_training(tmp_path, capsys):
    cell.measure_coreset(make_real(), "herding", 1, how(), tmp_path, epochs=2, bars=True)
    assert "training the convnet: " in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """The networks of each evaluation."""
    calls, evaluate = [], cell.evaluate

    def watch(*args, networks, **options):
        calls.append(list(networks))
        return evaluate(*args, networks=networks, **options)

    monkeypatch.setattr(cell, "evaluate", watch)
    return calls


def test_only_networks_that_are_missing_are_trained(tmp_path, asked):
    real = make_real()

    def measure(*networks, **options):
        return cell.measure_coreset(real, "random", 1, how(*networks, **options), tmp_path, bars=False)

    first = measure("mlp")
    both = measure("convnet", "mlp")
    assert asked == [["mlp"], ["convnet"]] and both["results"][1] == first["results"][0]
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert [result["network"] for result in stored["results"]] == ["convnet", "mlp"]
    assert measure("mlp") == first and measure("convnet", "mlp") == both
    assert len(asked) == 2
    for options in ({"runs": 2}, {"epochs": 2}, {"seed": 1}, {"standardisation": "speed"}, {"precision": "bf16"},
                    {"epochs": None, "protocol": "quick"}):
        changed = measure("mlp", **options)
        assert asked[2:] == [["mlp"]] and measure("mlp", **options) == changed
        del asked[2:]
    assert measure("convnet", "mlp") == both and len(asked) == 2


def test_each_network_keeps_how_it_was_measured(tmp_path, monkeypatch):
    for commit, networks in (("old", ["mlp"]), ("new", ["mlp", "convnet"])):
        monkeypatch.setattr(cell, "_commit", lambda commit=commit: commit)
        measured = cell.measure_coreset(make_real(), "random", 1, how(*networks), tmp_path, bars=False)
    target = tables.Target("coreset", "random", "cifar10", 1)
    cells = [tables.Cell("1", "Random", network, network, "", target) for network in ("mlp", "convnet")]
    assert [tables.cell_line(one, measured)["commit"] for one in cells] == ["old", "new"]


def test_networks_that_did_not_train_are_trained_again(tmp_path, asked, monkeypatch):
    real, evaluate = make_real(), cell.evaluate
    monkeypatch.setattr(cell, "evaluate", lambda *args, **options: evaluate(*args, **options, rate=1e30))
    assert cell.measure_whole(real, how(epochs=3), tmp_path, bars=False)["results"][0]["mean"] is None
    monkeypatch.setattr(cell, "evaluate", evaluate)
    assert cell.measure_whole(real, how(epochs=3), tmp_path, bars=False)["results"][0]["mean"] is not None
    assert len(asked) == 2 and len(json.loads((tmp_path / "cell.json").read_text())["results"]) == 1


@pytest.mark.parametrize("old", [
    '{"seconds": 7.0, "wanted": {"what": {}}, "found": {"steps": 0, "steps_of": 0, "results": []}}', "[]", "{", ""])
def test_a_record_of_an_older_form_has_nothing_measured(tmp_path, asked, old):
    (tmp_path / "cell.json").write_text(old)
    line = cell.measure_whole(make_real(), how(), tmp_path, bars=False)
    assert len(asked) == 1 and (line["distil_seconds"] == 7.0) == ("seconds" in old)


def test_results_of_another_set_are_forgotten(tmp_path):
    record = Record(tmp_path, {"what": 1})
    record.of({"checksum": "a", "steps": 1, "steps_of": 2})
    record.add({"network": "mlp"}, {"mean": 3.0})
    record.write()
    record = Record(tmp_path, {"what": 1})
    assert not record.complete and record.result({"network": "mlp"}) == {"mean": 3.0}
    record.of({"checksum": "b", "steps": 2, "steps_of": 2})
    assert record.complete and record.lacks({"network": "mlp"}) and not Record(tmp_path, {"what": 2}).results
