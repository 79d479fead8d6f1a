"""A cell of a table: what its clock counts, and what is measured once."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from stripes import make_real

from speedk.data import zca
from speedk.evaluation import cell


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
