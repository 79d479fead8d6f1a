"""What an evaluation says: a table for people, JSON for everything else."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from speedk.text import mean_std, table

if TYPE_CHECKING:
    from speedk.evaluation.robustness import Robustness


@dataclass(frozen=True)
class NetworkResult:
    """The runs of one network. accuracies: per cent of the test set, last epoch, one a run, None where it failed."""

    network: str
    parameters: int
    seeds: list[int]
    accuracies: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    """Of failed runs: the seed, and what happened."""

    @property
    def mean(self) -> float | None:
        """Of all runs; None where one of them failed."""
        return None if None in self.accuracies else statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """The population standard deviation of all runs; None where one of them failed."""
        return None if None in self.accuracies else statistics.pstdev(self.accuracies)


@dataclass(frozen=True)
class Report:
    """One evaluation. `str` gives the table, `to_json` the same as text, `failed` whether any run failed.

    protocol: name, standardisation and schedule; data: what `RealData.describe` says; storage: parts and their
    float32-equivalents.
    """

    source: str
    images: int
    storage: dict[str, float]
    data: dict[str, Any]
    protocol: dict[str, Any]
    seed: int
    device: str
    seconds: float
    results: list[NetworkResult]
    details: dict[str, Any] = field(default_factory=dict)
    corrupted_by: str = ""
    robustness: list[Robustness] = field(default_factory=list)
    """Of each network, where it was tested on corrupted images too; `corrupted_by` says where those come from."""

    @property
    def failed(self) -> bool:
        return any(result.failures for result in self.results)

    def accuracy(self, network: str | None = None) -> float | None:
        """The mean accuracy, in per cent, of `network` (default: the first)."""
        return next(r for r in self.results if network in (None, r.network)).mean

    def to_dict(self) -> dict[str, Any]:
        results = [{"network": r.network, "parameters": r.parameters, "mean": r.mean, "std": r.std, "seeds": r.seeds,
                    "accuracies": r.accuracies, "failures": {str(seed): text for seed, text in r.failures.items()}}
                   for r in self.results]
        document = {"source": self.source, "images": self.images, "storage": self.storage, "data": self.data,
                    "protocol": self.protocol, "seed": self.seed, "device": self.device,
                    "seconds": round(self.seconds, 1), "results": results, "details": self.details}
        if self.robustness:
            document["corruptions"] = {"source": self.corrupted_by, "results": [r.to_dict() for r in self.robustness]}
        return document

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        numbers = sum(self.storage.values())
        note = f", {self.data['note']}" if self.data.get("note") else ""
        lines = [
            ("source", f"{self.source}: {self.images:,} images"),
            ("storage", f"{numbers:,.10g} float32 numbers, {4 * numbers:,.10g} bytes" + _parts(self.storage)),
            ("data", f"{self.data['name']}, split {self.data['split']}, {self.data['test']:,} test images{note}"),
            ("protocol", f"{self.protocol['name']}: {self.protocol['schedule']}"),
            ("", f"{self.protocol['standardisation']}: {_STANDARDISATION[self.protocol['standardisation']]}"),
            ("accuracy", f"per cent of the test set after the last epoch; seeds {_seeds(self.results)}; "
                         f"{self.seconds:,.0f} s on {self.device}"),
        ]
        text = [f"{name:<9} {value}" for name, value in lines]
        rows = [["network", "parameters", "mean +- std", "runs"]]
        for r in self.results:
            runs = "  ".join("failed" if a is None else f"{a:.2f}" for a in r.accuracies)
            rows.append([r.network, f"{r.parameters:,}", mean_std(r.mean, r.std, len(r.seeds)), runs])
        text += ["", table(rows, numbers=(1, 2))]
        text += [f"{r.network}, seed {seed}: {why}" for r in self.results for seed, why in r.failures.items()]
        if self.robustness:
            text += ["", f"corrupted test images, {self.corrupted_by}: the mean of five severities", "",
                     _corrupted(self.robustness)]
        return "\n".join(text)


_STANDARDISATION = {
    "mtt": "no per-batch standardisation",
    "speed": "every batch standardised by its own statistics, in testing too: accuracy depends on the batch",
}


def _parts(storage: dict[str, float]) -> str:
    if len(storage) < 2:
        return ""
    return " (" + ", ".join(f"{name} {numbers:,.10g}" for name, numbers in storage.items()) + ")"


def _seeds(results: list[NetworkResult]) -> str:
    return " ".join(str(seed) for seed in results[0].seeds)


def _corrupted(found: list[Robustness]) -> str:
    """A row for each corruption, a column for each network."""
    rows = [["corruption", *(r.network for r in found)]]
    rows += [[name, *(_number(r.of(name)) for r in found)] for name in found[0].accuracies]
    rows.append([f"mean of all {len(found[0].accuracies)}", *(mean_std(r.mean, r.std, len(r.clean)) for r in found)])
    rows.append(["as they are", *(_number(None if r.failed else statistics.fmean(r.clean)) for r in found)])
    return table(rows, range(1, len(rows[0])))


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"
