"""What the tests of the Triton kernels share: the device, inputs of awkward strides, and PyTorch's own gradients."""

from __future__ import annotations

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
LAYOUTS = ["transposed", "sliced", "expanded"]


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


def kinds(shapes: list, dtypes: list) -> list:
    """Parameters (shape, dtype): every shape in float32, the first in the other dtypes. On a GPU each pair is a kernel
    of its own to compile, so not all of them."""
    others = [pytest.param(shapes[0], *getattr(d, "values", [d]), marks=getattr(d, "marks", ())) for d in dtypes[1:]]
    return [*((shape, dtypes[0]) for shape in shapes), *others]


def gradients(function, *inputs: torch.Tensor, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of `function(*inputs)` by PyTorch's autograd, against `cotangent`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, cotangent))
