"""Mean and deviation as they are printed: one run has no deviation, in whichever table."""

from __future__ import annotations

import pytest

from speedk.cli import continual, demo, sweep
from speedk.corruptions import NAMES, SEVERITIES
from speedk.evaluation import ContinualReport, NetworkResult, Report
from speedk.evaluation.continual import Curve
from speedk.evaluation.paper import tables
from speedk.evaluation.robustness import Robustness
from speedk.text import mean_std

DATA = {"name": "stripes", "split": "made up", "test": 12, "note": ""}
PROTOCOL = {"name": "quick", "schedule": "", "standardisation": "mtt", "epochs": 1}


def report(accuracies):
    seeds, failed = list(range(len(accuracies))), None in accuracies
    known = [a for a in accuracies if a is not None]
    corrupted = Robustness("mlp", known, {name: [known for _ in SEVERITIES] for name in NAMES}, failed)
    return Report("x", 4, {"pixels": 8.0}, DATA, PROTOCOL, 0, "CPU", 1.0, [NetworkResult("mlp", 10, seeds, accuracies)],
                  robustness=[corrupted])


def line(accuracies):
    result = report(accuracies).results[0]
    return {"fields": {"k": 1}, "images_per_class": 1, "numbers": 8, "budget": 8, "runs": len(accuracies),
            "mean": result.mean, "std": result.std,
            "results": [{"network": "mlp", "mean": result.mean, "std": result.std, "accuracies": accuracies}]}


def continually(accuracies):
    memory = {"source": "x", "images": 4, "storage": {"pixels": 8.0},
              "split": "", "schedule": "", "standardisation": ""}
    return ContinualReport([2], [memory], [Curve("x", "mlp", [accuracies], [])], DATA, list(range(len(accuracies))),
                           "CPU", 1.0)


PRINTED = {
    "evaluate": lambda accuracies: str(report(accuracies)).partition("corrupted")[0],
    "evaluate, corrupted": lambda accuracies: str(report(accuracies)).partition("corrupted")[2],
    "continual": lambda accuracies: continual.text(continually(accuracies)),
    "sweep": lambda accuracies: sweep._table([line(accuracies)], ["k"]),
    "demo": lambda accuracies: demo._table({"SPEED": report(accuracies)}),
    "reproduce": lambda accuracies: tables.accuracy(line(accuracies)),
}


@pytest.mark.parametrize("command", PRINTED)
def test_one_run_has_no_deviation(command):
    digits, sign = (1 if command in ("demo", "reproduce") else 2), ("±" if command == "reproduce" else " +- ")
    for accuracies, said in (([50.0, 60.0], f"{55:.{digits}f}{sign}{5:.{digits}f}"),
                             ([50.0], f"{50:.{digits}f} (one run)"), ([50.0, None], "failed")):
        page = PRINTED[command](accuracies)
        assert said in page and ("(one run)" in page) == (len(accuracies) == 1)
        assert f"{0:.{digits}f}" not in page.split()


def test_mean_and_deviation_as_text():
    assert mean_std(12.3, 0.68, 5) == "12.30 +- 0.68"
    assert mean_std(12.3, 0.6, 5, digits=0, sign="±") == "12±1"
    assert (mean_std(12.3, 0.0, 1), mean_std(None, None, 1)) == ("12.30 (one run)", "failed")
