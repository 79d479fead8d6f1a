"""How long calls take, what memory they need, whether they agree, and what this machine can do at best.

On the CPU a round is one call between two clocks, and the best round counts: other work on the machine slows a round
down, never up. On a GPU a sample is one call between two events; before it the second-level cache is overwritten and,
where launching takes no longer than LONGEST_QUEUE, the device is kept busy until all of the call is queued, so that
the time is the GPU's and not Python's. A round is the median of its samples. Whoever is compared is timed alike, in
turns, until two rounds of each agree.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator

import torch
from peak import peak_bytes

from speedk.distillation.unroll import replay

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SECONDS = 0.5 if CUDA else 1.5  # of a contest, where the least number of rounds does not take longer
LONGEST_QUEUE = 0.02  # seconds; a call that takes longer to launch is used as it is, launches included
AGREE = 0.02  # two rounds of a GPU that differ by less than this part are to be trusted
PEAKS = 3  # of a call on the CPU, of which the least counts: what one thread frees a moment late another finds taken

Call = Callable[[], object]
_roofs: dict[str, float] = {}
_cache: list[torch.Tensor] = []


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """float32 products in "float32" or "tf32"; other names leave them as they are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high"}.get(name, before))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _wall(call: Call) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del result
    return taken


def _round(call: Call, wall: float) -> float:
    """The time of one round, given roughly how long a call takes by the clock."""
    if not CUDA:
        return _wall(call)
    if not _cache:
        _cache.append(torch.empty(64 << 20, dtype=torch.float32, device=DEVICE))  # five times an H100's cache
    samples = []
    for _ in range(min(max(int(0.05 / max(wall, 1e-6)), 1), 25)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        _cache[0].zero_()
        if wall < LONGEST_QUEUE:
            torch.cuda._sleep(int(2.0e9 * 1.5 * wall))  # cycles
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def in_turns(calls: dict[str, Call], at_least: int = 3, warm: Collection[str] = ()) -> dict[str, list[float]]:
    """The rounds of each, in seconds, taken in turns. Those that are `warm` have been called before."""
    for name, call in calls.items():
        if name not in warm:
            call()
    wall = {name: _wall(call) if CUDA else 0.0 for name, call in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()

    def settled() -> bool:
        spent = time.perf_counter() - started
        if not CUDA:
            return spent > SECONDS
        pairs = [sorted(times)[:2] for times in rounds.values()]
        return spent > 4 * SECONDS or (spent > SECONDS / 4 and all(b < (1 + AGREE) * a for a, b in pairs))

    while len(next(iter(rounds.values()))) < at_least or (not settled() and len(next(iter(rounds.values()))) < 200):
        for name, call in calls.items():
            rounds[name].append(_round(call, wall[name]))
    return rounds


def best(calls: dict[str, Call], at_least: int = 3) -> dict[str, float]:
    """The best round of each, in seconds."""
    return {name: min(times) for name, times in in_turns(calls, at_least).items()}


def least_peak(call: Call) -> int | None:
    """Memory that `call` takes beyond what is held already, or None where the system does not say."""
    if CUDA:
        return _device_peak(call)
    peaks = [peak_bytes(call, DEVICE) for _ in range(PEAKS)]
    return None if None in peaks else min(peaks)


def _device_peak(call: Call) -> int:
    """With all that `speedk.unroll` needs for its CUDA graphs: a first call records them, in memory of their own where
    later calls compute, and where the allocator's peak does not see it."""
    replay.forget()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    first = peak_bytes(call, DEVICE)
    gc.collect()
    idle = sum(segment["total_size"] - segment["allocated_size"] for segment in torch.cuda.memory_snapshot()
               if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0))
    held = torch.cuda.memory_allocated() - before + idle
    return max(first, held + peak_bytes(call, DEVICE)) if idle else first


PRODUCTS = ((8192, 8192, 8192), (4096, 4096, 4096), (79360, 96, 96), (38400, 192, 192)) if CUDA else (
    (1024, 1024, 1024), (2048, 2048, 2048), (4096, 2048, 2048), (79360, 96, 96), (38400, 192, 192))  # fmt: skip


def roofs() -> dict[str, float]:
    """Measured here: bytes a second of a copy (read and write) and of a fill, and by precision FLOP a second of the
    best of the library's products [a, b] x [b, c] for a, b, c in PRODUCTS. The last is no bound: what is fused, or
    blocked better for its shape, can go beyond it."""
    if not _roofs:
        source = torch.randn(1 << (28 if CUDA else 26), device=DEVICE)
        target = torch.empty_like(source)
        times = best({"copy": lambda: target.copy_(source), "fill": lambda: target.fill_(1.0)}, 5)
        _roofs.update(copy=2 * 4 * source.numel() / times["copy"], fill=4 * source.numel() / times["fill"])
        del source, target
        for precision in precisions():
            _roofs[precision] = max(_product(precision, *shape) for shape in PRODUCTS)
    return _roofs


def _product(precision: str, a: int, b: int, c: int) -> float:
    left, right = (torch.randn(shape, device=DEVICE, dtype=dtype_of(precision)) for shape in ((a, b), (b, c)))
    with matmul_precision(precision):
        return 2 * a * b * c / best({"product": lambda: left @ right})["product"]


def agree(name: str, got, want, close: float = 1e-4, apart: float = 0.0) -> None:
    """Tensors, or tuples of them, are equal or close to rounding, but for the part `apart` of their values: rounding
    may put an activation on the other side of ReLU's kink, and then its image has another gradient."""
    far = count = 0
    for a, b in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (got, want)), strict=True):
        if a.is_floating_point():
            scale = b.abs().max().clamp(min=1e-30)
            far += (~((a - b).abs() < close * scale)).sum().item()
        else:
            assert torch.equal(a.long(), b.long()), f"{name} computes something else"
        count += a.numel()
    assert far <= apart * count, f"{name} computes something else"


def precisions() -> tuple[str, ...]:
    """What is measured here: on a GPU the fast precisions, too, each for both sides of a contest."""
    return ("float32", "tf32", "bf16") if CUDA else ("float32",)


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
