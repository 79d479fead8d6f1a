"""The benches measure what is asked: each floor has its contest and its peer, on a CPU and on a GPU, and no machine's
report takes the place of another's. Nothing is timed."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
BOTH_WAYS = ["add_layer_norm", "coo_decode", "freenet", "freenet_block", "mhsc", "mhsc_coo", "sparsify",
             "tokens_to_images"]  # fmt: skip
OURS = ["cases", "floors", "measuring", "peak", "reporting", *BENCHES]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ anew, and forgets it after the test."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in OURS:
        sys.modules.pop(name, None)


def contests(bench) -> list[dict]:
    """A row for whoever takes part in a contest, of two images, as if all had taken a second."""
    rows = []

    def contest(op, case, ours, peers, moved=0, flops=0, memory=False, yardsticks=None, precision="float32", items=0,
                **_):  # fmt: skip
        for who, call in {**ours, **peers, **(yardsticks or {})}.items():
            rows.append({
                "op": op, "case": case, "precision": precision, "who": who, "ours": who in ours, "milliseconds": 1e3,
                "of_roof": float(moved + flops > 0), "items_per_second": items, "peak_bytes": memory and 1,
                **({"absent": call} if isinstance(call, str) else {}),
            })  # fmt: skip

    for name in BENCHES:
        module = bench(name)
        if name == "bench_unroll":  # which walks through steps to see what fits: `test_the_floors_of_unroll`
            continue
        for function in [f for key, f in vars(module).items() if key.startswith("bench_")]:
            axes = [mark.args for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
            for chosen in itertools.product(*(axis[1] for axis in axes)):
                given = {}
                for (names, _), values in zip(axes, chosen, strict=True):
                    several = not isinstance(names, str)
                    given |= dict(zip(names, values, strict=True)) if several else {names: values}
                function(contest, **{k: replace(v, N=2) if is_dataclass(v) else v for k, v in given.items()})
    return rows


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_floor_is_measured(bench, device, monkeypatch):
    monkeypatch.setattr(bench("measuring"), "CUDA", device == "cuda")
    rows = contests(bench)
    floors = bench("floors")
    asked = [floor for floor in floors.FLOORS if floor.device == device and floor.op != "unroll"]
    assert asked and not [floor for floor in asked if not floor.measured(rows)]
    assert {f"{op} fwd+bwd" for op in BOTH_WAYS} <= {row["op"] for row in rows}
    if device == "cuda":
        compiled = {(row["case"], row["precision"]) for row in rows
                    if row["who"] == "torch.compile" and row["op"] == "freenet fwd+bwd"}
        cases = {row["case"] for row in rows if row["op"] == "freenet fwd+bwd"}
        assert len(cases) == 4 and compiled == set(itertools.product(cases, floors.FAST))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_floors_of_unroll_are_cases_of_its_bench(bench, device):
    module, floors = bench("bench_unroll"), bench("floors")
    shapes, steps = (mark.args[1] for mark in module.bench_unroll.pytestmark)
    cases = {f"{shape.name} T={count}" for shape in shapes for count in steps}
    asked = [floor for floor in floors.FLOORS if floor.device == device and floor.op == "unroll"]
    assert asked and {floor.case for floor in asked} <= cases
    assert {(floor.ours, floor.other) for floor in asked} <= {("constant", "eager"), ("full", "eager")}
    assert {floor.precision for floor in asked} == {"tf32" if device == "cuda" else "float32"}


def test_pytest_benchmark_is_told_what_was_measured(tmp_path):
    """A bench as its users run it: the rounds of ours, and the peers beside them, in pytest-benchmark's own file."""
    told = tmp_path / "told.json"
    done = subprocess.run([sys.executable, "-P", "-m", "pytest", "bench/bench_unroll_step.py", "-k", "forward",
                           "--benchmark-only", f"--benchmark-json={told}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, = json.loads(told.read_text())["benchmarks"]
    assert found["group"] == "unroll_step, P=320010, float32" and found["extra_info"]["bytes"] == 4 * 5 * 320_010
    assert 0 < found["stats"]["min"] < 1 and found["stats"]["rounds"] >= 3
    printed = [line.split() for line in done.stdout.splitlines()]
    for who, taken in (("*speedk", 1e3 * found["stats"]["min"]), ("eager", found["extra_info"]["eager, ms"])):
        assert any(who in words and f"{taken:.2f}" in words for words in printed)


@pytest.mark.parametrize("recording", [0, 200])
def test_the_peak_on_a_gpu_counts_the_memory_of_recordings(bench, monkeypatch, recording):
    """A recording of 200 holds 30 of it as tensors; the allocator sees neither the rest nor who computes in it."""
    measuring, held, calls = bench("measuring"), 1000, []
    peaks = iter([90, 40])
    segments = [{"total_size": 5000, "allocated_size": held, "segment_pool_id": (0, 0)}]

    def peak_bytes(call, device):
        call()
        return next(peaks)

    def call():
        if recording and not calls:
            segments.append({"total_size": recording, "allocated_size": 30, "segment_pool_id": (0, 1)})
        calls.append(call)

    monkeypatch.setattr(measuring, "peak_bytes", peak_bytes)
    monkeypatch.setattr(measuring.torch.cuda, "memory_allocated", lambda: sum(s["allocated_size"] for s in segments))
    monkeypatch.setattr(measuring.torch.cuda, "memory_snapshot", lambda: segments)
    assert measuring._device_peak(call) == (200 + 40 if recording else 90)
    assert len(calls) == (2 if recording else 1)


def test_a_peer_that_is_not_there(bench):
    """The table gives the reason in its row, and no floor takes it for measured."""
    reporting, floors = bench("reporting"), bench("floors")
    row = {"op": "freenet fwd+bwd", "case": "c", "precision": "tf32", "ours": False}
    rows = [{**row, "who": "speedk", "ours": True, "milliseconds": 1.0, "gigabytes_per_second": 0, "gigaflops": 0,
             "of_roof": 0, "times_best_peer": None, "peak_bytes": None},
            {**row, "who": "torch.compile", "absent": "is not installed"}]  # fmt: skip
    lines = reporting.table(rows)
    assert lines[2][2].strip() == "torch.compile: is not installed" and {len(line) for line in lines} == {len(lines[0])}
    floor = floors.Floor("cuda", row["op"], "c", "faster", 1.0, "torch.compile", precision="tf32")
    assert floor.measured(rows) is None


def test_reports_are_named_for_the_processor(bench, tmp_path):
    reporting = bench("reporting")
    names = set()
    for model in ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "AMD EPYC 9R14 96-Core Processor"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {model}\nmodel name\t: {model}\n")
        names.add(reporting.file_name(f"{reporting.processor(tmp_path / 'cpuinfo')}, 4 threads"))
    assert names == {"intel-xeon-platinum-8481c-cpu-2-70ghz-4-threads", "amd-epyc-9r14-96-core-processor-4-threads"}
    assert reporting.processor(tmp_path / "missing")
