"""Feature sparsification with global semantic preservation (paper, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native, registered


@dispatch.public
def topk_mask(scm: Tensor, k: int, *, check: bool | None = None) -> Tensor:
    """True for exactly the k entries of largest magnitude of each (image, head).

    Ties go to the lowest index j K + k. k = 0 keeps nothing.

    scm: [N, H, J, K] floating, any strides. check: whether a NaN in scm is looked for, which waits for the GPU; by
    default it is, but for a GPU under torch.compile or graph capture, and PyTorch's backend under transforms. That
    backend looks for none under torch.compile, even if asked. Where none is looked for, a NaN ranks below every number.
    Returns bool [N, H, J, K].
    Raises ValueError for scm that is not floating or of another shape, for k outside [0, J K] or, where checked, for a
    NaN.
    Backends: native (CPU, CUDA), torch.
    """
    fits_topk(scm, k)
    backend = _mask.choose(scm, k)
    check = dispatch.checks(check, backend, scm)
    if backend == "torch":
        return topk_mask_reference(scm, k, check)
    return _topk_mask(scm, k, check, backend)


@dispatch.public
def sparsify(scm: Tensor, k: int, *, check: bool | None = None) -> Tensor:
    """scm with all but its k largest entries per (image, head) set to zero: the bar-A of Eq. 6.

    Differentiable any number of times: the gradient passes through the entries that survive. Returns [N, H, J, K] of
    scm's dtype. Arguments, backends and what it raises (ValueError) as for `topk_mask`.
    """
    fits_topk(scm, k)
    backend = _sparse.choose(scm, k)
    check = dispatch.checks(check, backend, scm)
    if backend == "torch":
        return torch.where(topk_mask_reference(scm, k, check), scm, 0)
    return _sparsify(scm, k, check, backend)


def topk_mask_reference(scm: Tensor, k: int, check: bool = True) -> Tensor:
    n, h, j, tokens = scm.shape
    if check and torch.isnan(scm).any():
        raise _holds_nan()
    size = scm.detach().abs().nan_to_num(nan=-1, posinf=torch.inf)
    order = size.reshape(n, h, j * tokens).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter(-1, order[..., :k], True).reshape(n, h, j, tokens)


def fits_topk(scm: Tensor, k: int) -> None:
    if scm.ndim != 4:
        raise ValueError(f"scm must be [N, H, J, K], got {tuple(scm.shape)}")
    arguments.alike(scm=scm)
    size = scm.shape[2] * scm.shape[3]
    if not 0 <= k <= size:
        raise ValueError(f"k={k} is outside 0 to J K={size}")


def _holds_nan() -> ValueError:
    return ValueError("scm holds a NaN: its largest entries are not defined")


def select_natively(scm: Tensor, k: int, check: bool, **results: Tensor) -> None:
    """Fill `results` as `native.topk` does. Raises ValueError where a NaN is looked for and found."""
    nan = native.topk(scm, k, **results, check=check)
    if check and nan:
        raise _holds_nan()


NATIVE_ENTRIES = 2**30
"""Of a matrix, that the native kernels count in 32 bits, a step beyond the end included (csrc/topk.h)."""


def why_not_native_topk(scm: Tensor, k: int) -> str | None:
    if scm.dtype not in native.DTYPES:
        return f"{scm.dtype} is computed in PyTorch"
    if scm.shape[2] * scm.shape[3] > NATIVE_ENTRIES:
        return f"more than {NATIVE_ENTRIES:,} entries of a matrix are computed in PyTorch"
    return dispatch.why_not_native(scm)


_mask = dispatch.Op("topk_mask", native=why_not_native_topk, cuda=True)
_sparse = dispatch.Op("sparsify", native=why_not_native_topk, cuda=True)


@registered.custom_op("speedk::topk_mask")
def _topk_mask(scm: Tensor, k: int, check: bool, backend: str) -> Tensor:
    fits_topk(scm, k)
    mask = torch.empty(scm.shape, dtype=torch.bool, device=scm.device)
    select_natively(scm, k, check, mask=mask)
    return mask


@_topk_mask.register_fake
def _(scm: Tensor, k: int, check: bool, backend: str) -> Tensor:
    return torch.empty(scm.shape, dtype=torch.bool, device=scm.device)


@registered.custom_op("speedk::sparsify")
def _sparsify(scm: Tensor, k: int, check: bool, backend: str) -> Tensor:
    fits_topk(scm, k)
    kept = torch.empty(scm.shape, dtype=scm.dtype, device=scm.device)
    select_natively(scm, k, check, dense=kept)
    return kept


@_sparsify.register_fake
def _(scm: Tensor, k: int, check: bool, backend: str) -> Tensor:
    return torch.empty(scm.shape, dtype=scm.dtype, device=scm.device)


def _save(ctx, inputs, output) -> None:
    scm, ctx.k, _, ctx.backend = inputs
    ctx.save_for_backward(scm)


def _backward(ctx, d_kept: Tensor):
    # The mask is found again rather than kept: a quarter of scm's memory for a pass that reads it once more.
    (scm,) = ctx.saved_tensors
    return torch.where(_topk_mask(scm.detach(), ctx.k, False, ctx.backend), d_kept, 0), None, None, None


_sparsify.register_autograd(_backward, setup_context=_save)
