"""Contests between ways to compute the same thing, and the table of their results.

A contest checks first that all contestants agree, then times them in turns, round after round, and keeps the best
round of each: other work on the machine slows a round down, never up, and hits all contestants alike. Roofs are
measured in the same session: a copy and a fill of 256 MiB, a product of two 2048 x 2048 matrices. With --save the
results go to bench/results/, as JSON and as a page.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.5  # of a contest, where three rounds do not take longer
CUDA = torch.cuda.is_available()
MMAP_THRESHOLD = -3  # the number of that option of glibc's mallopt

_rows: list[dict] = []
_roofs: dict[str, float] = {}


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the cases that take minutes, too")
    parser.addoption("--save", action="store_true", help="write the results to bench/results/")


def pytest_configure(config):
    torch.manual_seed(0)
    # A compilation that was once killed leaves a broken file in the shared cache, which fails every later one.
    cache = tempfile.TemporaryDirectory(prefix="speedk-bench-")
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name


def seconds(call: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del result
    return taken


def best(calls: dict[str, Callable[[], object]], at_least: int = 3) -> dict[str, float]:
    """The best time of each, in seconds, of rounds in turns."""
    found = {name: seconds(call) for name, call in calls.items()}  # the first round warms up
    found = dict.fromkeys(found, float("inf"))
    started, rounds = time.perf_counter(), 0
    while rounds < at_least or (time.perf_counter() - started < SECONDS and rounds < 200):
        for name, call in calls.items():
            found[name] = min(found[name], seconds(call))
        rounds += 1
    return found


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that `call` takes beyond what is held already, or None where the system does not say."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 16)  # no tensor is taken from what was freed before, and all go back at once
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    except (OSError, AttributeError):
        return None
    before = _status()["VmRSS"]
    result = call()
    after = _status()["VmHWM"]
    del result
    libc.mallopt(MMAP_THRESHOLD, 1 << 25)  # where glibc itself ends up in a process that frees large blocks
    return max(after - before, 0)


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}


def roofs() -> dict[str, float]:
    """Measured here: bytes a second of a copy (read and write) and of a fill, FLOP a second of a float32 product."""
    if not _roofs:
        device = "cuda" if CUDA else "cpu"
        source, square = torch.randn(1 << 26, device=device), torch.randn(2048, 2048, device=device)
        target = torch.empty_like(source)
        time_of = best({"copy": lambda: target.copy_(source), "fill": lambda: target.fill_(1.0),
                        "product": lambda: square @ square})  # fmt: skip
        _roofs.update(copy=2 * 4 * source.numel() / time_of["copy"], fill=4 * source.numel() / time_of["fill"],
                      product=2 * 2048**3 / time_of["product"])
    return _roofs


def agree(name: str, got, want, close: float = 1e-4, apart: float = 0.0) -> None:
    """Tensors, or tuples of them, are equal or close to float32's rounding, but for the part `apart` of their values:
    rounding may put an activation on the other side of ReLU's kink, and then its image has another gradient."""
    far = count = 0
    for a, b in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (got, want)), strict=True):
        if a.is_floating_point():
            scale = b.abs().max().clamp(min=1e-30)
            far += (~((a - b).abs() < close * scale)).sum().item()
        else:
            assert torch.equal(a.long(), b.long()), f"{name} computes something else"
        count += a.numel()
    assert far <= apart * count, f"{name} computes something else"


@pytest.fixture
def contest(request):
    def run(op: str, case: str, ours: dict[str, Callable[[], object]], peers: dict[str, Callable[[], object]],
            moved: int = 0, flops: int = 0, memory: bool = False, yardsticks: dict | None = None,
            close: float = 1e-4, apart: float = 0.0, rounds: int = 3) -> None:
        """Time `ours` (by backend) against `peers`; `moved` bytes and `flops` are the least the op has to do.
        Yardsticks are timed along and not compared for their results (a copy of the input, say). Results may differ by
        `close`, a part of the largest value, and the part `apart` of the values by more; at least `rounds` rounds."""
        calls = {**ours, **peers}
        first = next(iter({**peers, **ours}.values()))()
        for name, call in calls.items():
            agree(f"{op}: {name}", call(), first, close, apart)
        times = best({**calls, **(yardsticks or {})}, rounds)
        peaks = {name: peak_bytes(call) for name, call in calls.items()} if memory else {}
        roof = max(moved / roofs()["copy"], flops / roofs()["product"])
        rival = min((times[name] for name in peers), default=None)
        for name, taken in times.items():
            _rows.append({
                "op": op, "case": case, "who": name, "ours": name in ours, "milliseconds": 1e3 * taken,
                "gigabytes_per_second": moved / taken / 1e9, "gigaflops": flops / taken / 1e9,
                "of_roof": roof / taken, "times_best_peer": rival and rival / taken, "peak_bytes": peaks.get(name),
            })  # fmt: skip

    return run


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not _rows:
        return
    device = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, {torch.get_num_threads()} threads"
    roof = roofs()
    head = (f"{device}: copy {roof['copy'] / 1e9:.1f} GB/s, fill {roof['fill'] / 1e9:.1f} GB/s, "
            f"float32 product {roof['product'] / 1e9:.0f} GFLOP/s")
    table = _table()
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    terminalreporter.write_line(f"\n{head}")
    for row in table:
        terminalreporter.write_line("  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))
    if not config.getoption("--save"):
        return
    RESULTS.mkdir(exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in device.lower())
    today = time.strftime("%Y-%m-%d")
    report = {"device": device, "torch": torch.__version__, "date": today, "load_before": os.getloadavg()[1],
              "roofs": roof, "rows": _rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [table[0], ["---"] * 3 + ["--:"] * (len(table[0]) - 3), *table[1:]]
    page = (f"# {device}\n\n`pytest bench/` on {today}, PyTorch {torch.__version__}. {head.partition(': ')[2]}.\n"
            f"Ours are marked *; the ratio is the best peer's time over this one's; the roof is the greater of bytes "
            f"to move at the rate of a copy and FLOP at the rate of a product.\n\n")
    page += "".join("| " + " | ".join(cell.replace("*", "\\*") for cell in row) + " |\n" for row in lines)
    (RESULTS / f"{name}.md").write_text(page)


def _table() -> list[list[str]]:
    """The results as text, a row each, under a row of titles; what repeats from the row above is left out."""
    table = [["op", "case", "", "ms", "GB/s", "GFLOP/s", "% roof", "x best peer", "peak MB"]]
    last = None
    for row in _rows:
        head = [row["op"], row["case"]] if [row["op"], row["case"]] != last else ["", ""]
        last = [row["op"], row["case"]]
        rates = [f"{row['gigabytes_per_second']:.1f}" if row["gigabytes_per_second"] else "",
                 f"{row['gigaflops']:.0f}" if row["gigaflops"] else ""]
        table.append([*head, ("*" if row["ours"] else " ") + row["who"], f"{row['milliseconds']:.2f}", *rates,
                      f"{100 * row['of_roof']:.0f}" if row["of_roof"] else "",
                      "" if row["times_best_peer"] is None else f"{row['times_best_peer']:.2f}",
                      "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"])  # fmt: skip
    return table
