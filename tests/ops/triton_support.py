"""What the tests of the Triton kernels share: the device, inputs of awkward strides, poisoned memory, the measure."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
DOT_FLOATS = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
        DEVICE == "cpu", reason="Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot")),
]  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, layout: str = "plain") -> torch.Tensor:
    """Normal values on DEVICE; layout is "plain", "transposed" (last two dimensions swapped in memory), "sliced"
    (every second element of a larger tensor) or "expanded" (stride 0 along the first dimension)."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        values = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator)
        return values.to(DEVICE, dtype).transpose(-1, -2)
    if layout == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(DEVICE, dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(1, *shape[1:], generator=generator).to(DEVICE, dtype).expand(shape)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


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
    plus four roundings of the largest value."""
    assert got.shape == exact.shape and got.dtype == library.dtype, f"{name}: {got.shape} {got.dtype}"
    assert torch.isfinite(got).all(), f"{name} holds a value that is not finite"
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (library.double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def gradients(function, *inputs: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of `function(*inputs)` by PyTorch's autograd, against `cotangent`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, cotangent))
