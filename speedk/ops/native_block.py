"""Launchers of the CUDA kernels of FReeNet's block, named and called like Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops.dispatch import native
from speedk.ops.native import DTYPES, address, gpu_lacks, launch, ready, takes
from speedk.precision import tf32_allowed

DTYPES_OF_BLOCK = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def width() -> int:
    """The D for which there is a kernel."""
    return native().block_width


@torch.compiler.assume_constant_result
def why_not(dtype: torch.dtype, device: int | None) -> str | None:
    """Why this GPU (any, if it is None and there is none here) cannot compute in this type, or None."""
    if dtype not in DTYPES_OF_BLOCK:
        return f"{dtype} is computed in PyTorch"
    if not torch.cuda.is_available():
        return None
    return gpu_lacks(device, native().block_bytes(DTYPES[dtype]))


BLOCK_CHUNK = 16384
"""Tokens that the backward pass of a block takes at a time, at most: a program for each multiprocessor of an H100."""

SPLITS = 44
"""Parts of a chunk's tokens over which the gradients of the matrices are summed, each by a program for each of the
three. Fixed, so that the sums have one order everywhere."""


def _takes(tensor: Tensor) -> None:
    takes(tensor, DTYPES_OF_BLOCK, cuda=True)
    if not tensor.is_cuda:
        raise ValueError(f"the native kernel of a block is for the GPU, a tensor is on {tensor.device}")


def _block(features: Tensor, state: Tensor | None, weights: list[Tensor], norm: str, eps: float):
    """For tokens [M, D]."""
    return native().FreenetBlock(DTYPES[features.dtype], tf32_allowed(), norm == "sum", *features.shape,
                                 features.data_ptr(), address(state), [w.data_ptr() for w in weights], eps)


def _tokens(D: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else ready(t).view(-1, D) for t in tensors]


def freenet_block_fwd(features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str,
                      eps: float) -> Tensor:
    """features [N, J, D] and state (the same, or None); weights: the ten of `BlockWeights` -> [N, J, D]."""
    _takes(features)
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    rows, state = _tokens(features.shape[-1], features, state)
    weights = [ready(w) for w in weights]
    launch("freenet_block", _block(rows, state, weights, norm, eps), out)
    return out


def freenet_block_bwd(
    d_out: Tensor, features: Tensor, state: Tensor | None, weights: tuple[Tensor, ...], norm: str, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of `freenet_block_fwd` for d_out [N, J, D]: d_features, d_state or None, those of the weights that are
    matrices [3, D, D] and of those that are vectors [7, D]."""
    _takes(features)
    shape, D, like = features.shape, features.shape[-1], dict(dtype=features.dtype, device=features.device)
    weights = [ready(w) for w in weights]
    d_out, features, state = _tokens(D, d_out, features, state)
    d_features, d_state = torch.empty(shape, **like), None if state is None else torch.empty(shape, **like)
    M = len(features)
    if M == 0:
        return d_features, d_state, torch.zeros(3, D, D, **like), torch.zeros(7, D, **like)
    tokens = native().block_tokens
    chunks = -(-M // BLOCK_CHUNK)
    chunk = -(-M // (chunks * tokens)) * tokens
    factors = torch.empty(5, min(M, chunk), D, **like)
    sums = torch.empty(-(-len(factors[0]) // tokens), 7 * D, dtype=torch.float32, device=like["device"])
    partial = torch.empty(SPLITS, 3, D, D, dtype=torch.float32, device=like["device"])
    for start in range(0, M, chunk):
        given, x, s, d_x, d_s = (None if t is None else t.view(M, D)[start:start + chunk]
                                 for t in (d_out, features, state, d_features, d_state))  # fmt: skip
        launch("freenet_block_backward", _block(x, s, weights, norm, eps), given, d_x, d_s, factors, sums,
                numbers=(factors[0].numel(), start > 0))
        d_branch, d_inner, d_mlp, hidden, active = factors.unbind()
        job = native().RowProducts(DTYPES[like["dtype"]], tf32_allowed(), len(x),
                                   [t.data_ptr() for t in (d_branch, d_inner, d_mlp)],
                                   [t.data_ptr() for t in (x, hidden, active)])  # fmt: skip
        launch("row_products", job, partial, numbers=(SPLITS, start > 0))
    return d_features, d_state, _sum_rows(partial, like["dtype"]), _sum_rows(sums.view(-1, 7, D), like["dtype"])


def _sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """partial [rows, ...] float32 -> its sum over rows, in `dtype`, in one order everywhere."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    launch("sum_rows", DTYPES[dtype], partial, out, None, numbers=(len(partial), out.numel(), out.numel()))
    return out
