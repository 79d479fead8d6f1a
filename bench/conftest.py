"""Contests between ways to compute the same thing, and the table of their results.

A contest checks first that all contestants agree, then times them in turns (measuring.py has how), round after round.
Roofs are measured in the same session. With --save the results go to bench/results/, as JSON and as a page, which also
say for each floor (floors.py) what was asked and what was measured.

pytest-benchmark is told the rounds of ours, with peers and roof as extra information, so that its --benchmark-json,
--benchmark-autosave and --benchmark-compare do for these benches what they do for others. It does not time them: it
would time one contestant after another, which on a shared machine compares two moments and not two contestants.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import reporting
import torch
from measuring import CUDA, Call, agree, in_turns, least_peak, matmul_precision, roofs

BENCHMARK = importlib.util.find_spec("pytest_benchmark") is not None
CLOSE = {"float32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}  # of the largest value: what rounding may make of a result

_rows: list[dict] = []
_missing: list[str] = []
_started = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the cases that take minutes, too")
    parser.addoption("--save", action="store_true", help="write the results to bench/results/")
    parser.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="where --save writes")
    parser.addoption("--seconds", type=float, help="start no bench after this time")


class Replay:
    """A clock that shows how long each round took when it was measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def tell(self, benchmark, group: str, rounds: list[float], extra: dict) -> None:
        """Have pytest-benchmark, whose timer is `read`, take `rounds` for its own."""
        left = iter(rounds)

        def target() -> None:
            self.now += next(left)

        benchmark.group = group
        benchmark.extra_info.update(extra)
        benchmark.pedantic(target, rounds=len(rounds))


_replay = Replay()
if not BENCHMARK:

    @pytest.fixture
    def benchmark():
        return None


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is stopped says what was measured so far
    torch.manual_seed(0)
    # A compilation that was once killed leaves a broken file in the shared cache, which fails every later one.
    cache = tempfile.TemporaryDirectory(prefix="speedk-bench-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    if BENCHMARK and not config.getoption("benchmark_compare"):
        config.option.benchmark_quiet = True  # the table at the end has peers and roofs, too
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache.name)


def pytest_collection_modifyitems(config, items):
    """What has floors comes first, for a session that may not last to the end."""
    for item in items if BENCHMARK else ():
        item.add_marker(pytest.mark.benchmark(timer=_replay.read))
    if config.getoption("--seconds"):
        order = ["bench_freenet_training", "bench_unroll[", "bench_freenet_coo", "bench_coo", "bench_topk",
                 "bench_patches"]  # fmt: skip
        items.sort(key=lambda item: next((i for i, name in enumerate(order) if name in item.nodeid), len(order)))


@pytest.fixture(autouse=True)
def in_time(request):
    limit = request.config.getoption("--seconds")
    if limit and time.monotonic() - _started > limit:
        pytest.skip(f"left out: {limit:.0f} s were over")
    yield
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def pytest_runtest_logreport(report):
    if report.failed or (report.skipped and "left out" in str(report.longrepr)):
        why = report.longrepr[2] if report.skipped else report.longrepr  # not the path of who skips
        text = getattr(getattr(why, "reprcrash", None), "message", "") or str(why)
        _missing.append(f"{report.nodeid}: {' '.join(text.split())[:300]}")


@pytest.fixture
def contest(request, benchmark):
    def run(op: str, case: str, ours: dict[str, Call], peers: dict[str, Call | str], moved: int = 0, flops: int = 0,
            memory: bool = False, yardsticks: dict[str, Call] | None = None, close: float | None = None,
            apart: float = 0.0, rounds: int = 3, precision: str = "float32", items: int = 0) -> None:
        """Time `ours` (by backend) against `peers`; `moved` bytes and `flops` are the least the op has to do, `items`
        how many images come out. Yardsticks are timed along and not compared for their results (a copy of the input,
        say). Results may differ by `close`, a part of the largest value, and the part `apart` of the values by more; at
        least `rounds` rounds. One contest a bench. `precision` is that of both sides. In place of a peer's call may
        stand why it cannot take part, which the table says; so it does of one that a GPU's memory does not hold."""
        with matmul_precision(precision):
            apart = apart if precision == "float32" else max(apart, 0.01)
            peers, absent = _agreeing(op, ours, peers, close or CLOSE[precision], apart)
            calls = {**ours, **peers}
            found = in_turns({**calls, **(yardsticks or {})}, rounds, warm=calls)
            times = {name: min(taken) for name, taken in found.items()}
            peaks = {name: least_peak(call) for name, call in calls.items()} if memory else {}
        roof = max(moved / roofs()["copy"], flops / roofs()[precision])
        rival = min((times[name] for name in peers), default=None)
        for name, taken in times.items():
            _rows.append({
                "op": op, "case": case, "precision": precision, "who": name, "ours": name in ours,
                "milliseconds": 1e3 * taken, "gigabytes_per_second": moved / taken / 1e9,
                "gigaflops": flops / taken / 1e9, "items_per_second": items / taken,
                "of_roof": roof / taken, "times_best_peer": rival and rival / taken, "peak_bytes": peaks.get(name),
            })  # fmt: skip
        if benchmark is not None:
            peer = {f"{name}, ms": 1e3 * taken for name, taken in times.items() if name not in ours}
            first = next(iter(ours))
            _replay.tell(benchmark, f"{op}, {case}, {precision}", found[first],
                         {"bytes": moved, "flop": flops, "of_roof": roof / times[first], **peer})
        for name, why in absent.items():
            _rows.append({"op": op, "case": case, "precision": precision, "who": name, "ours": False, "absent": why})
            _missing.append(f"{op}, {case}, {precision}: {name}: {why}")
        if request.config.getoption("--save"):
            reporting.save(_rows, _missing, request.config.getoption("--results"))

    run.leave_out = _missing.append  # says why something is not measured
    return run


def _agreeing(op: str, ours: dict[str, Call], peers: dict[str, Call | str], close: float,
              apart: float) -> tuple[dict[str, Call], dict[str, str]]:
    """The peers that can take part, and why the others cannot. Each of them and of ours is called once, and gives what
    the first peer gives."""
    absent = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
    found = {name: peer for name, peer in peers.items() if name not in absent}
    first = None
    for name, call in {**found, **ours}.items():
        try:
            if first is None:
                first = call()
            else:
                agree(f"{op}: {name}", call(), first, close, apart)
        except torch.OutOfMemoryError:
            if name in ours:
                raise
            absent[name] = "does not fit the memory"
            del found[name]
        if name in absent:  # and what the failed call held is gone now
            torch.cuda.empty_cache()
    return found, absent


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not _rows:
        return
    terminalreporter.write_line(f"\n{reporting.DEVICE_NAME}: {reporting.roofs_in_words()}")
    ran = {row["op"] for row in _rows}
    head, *floors = reporting.floors_table(_rows)
    floors = reporting.aligned([head, *(line for line in floors if line[0] in ran)], 6)
    results = reporting.aligned(reporting.table(_rows), 3)
    for line in [*results, "", *floors, *(f"left out: {text}" for text in _missing)]:
        terminalreporter.write_line(line.rstrip())
    if config.getoption("--save"):
        reporting.save(_rows, _missing, config.getoption("--results"))
