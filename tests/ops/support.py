"""What the tests of the ops share: backends, awkward strides, poisoned memory, and one measure of closeness."""

from __future__ import annotations

import contextlib

import pytest
import torch

from speedk.ops import dispatch

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
built = pytest.mark.skipif(dispatch.native() is None, reason="the extension is not built")


def on_backends(op: str, devices: list[str] | None = None) -> pytest.MarkDecorator:
    """Run a test on each backend of `op` but Triton, whose kernels have tests of their own; with `devices`, on each
    pair (backend, device) that dispatch knows a kernel for."""
    table = dispatch._ops[op]
    pairs = [(b, d) for b in table.backends if b != "triton" for d in devices or ["cpu"]]

    def pair(backend: str, device: str):
        said = dispatch.installed(op, device)[backend]
        reason = None if said in ("chosen", "available") else said
        values = (backend, device) if devices else (backend,)
        return pytest.param(*values, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))

    return pytest.mark.parametrize(("backend", "device") if devices else ("backend",), [pair(*p) for p in pairs])


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values laid out otherwise: "plain", "transposed" (the last two dimensions swapped in memory), "sliced"
    (every second element of a larger tensor), "expanded" (stride 0 along the first dimension: the first row, repeated).
    """
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        larger = torch.full((*tensor.shape, 2), 7.0, dtype=tensor.dtype)
        larger[..., 0] = tensor
        return larger[..., 0]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


LAYOUTS = ["plain", "transposed", "sliced", "expanded"]


@contextlib.contextmanager
def products_by(unit: bool):
    """The native kernels take float32 products to the processor's matrix unit, where it has one, or to its vectors."""
    before = dispatch.native().matrix_unit()
    try:
        yield dispatch.native().use_matrix_unit(unit)
    finally:
        dispatch.native().use_matrix_unit(before)


def _has_unit() -> bool:
    if dispatch.native() is None:
        return False
    with products_by(True) as found:
        return found


has_unit = pytest.mark.skipif(not _has_unit(), reason="the extension is not built, or this processor has no AMX")
BY_EACH_UNIT = pytest.mark.parametrize("unit", [pytest.param(True, marks=has_unit, id="matrix unit"),
                                                pytest.param(False, marks=built, id="vectors")])


@contextlib.contextmanager
def poisoned_memory():
    """Fill what `torch.empty` hands out with NaN (or the largest integer), so that an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_matches(name: str, got: torch.Tensor, library: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` must be at most twice as far from `exact` (float64) as the library's own result in the same dtype is,
    plus four roundings of the largest value; in float64, where `exact` is no better, plus 1e-13 of it.

    `library` and `exact` are of `forms` or of loops, never of the code under test: see there."""
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} is not {tuple(exact.shape)}"
    assert got.dtype == library.dtype, f"{name}: {got.dtype} is not {library.dtype}"
    assert torch.isfinite(got).all(), f"{name} holds a value that is not finite"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (library.double() - exact).abs().max().item()
    roundings = 1e-13 if got.dtype == torch.float64 else 4 * torch.finfo(got.dtype).eps
    allowed += roundings * exact.abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def compiles(function, *arguments) -> None:
    """`function` traces as one graph, and the graph gives what plain execution gives."""
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    want = function(*arguments)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert torch.equal(a, b)

