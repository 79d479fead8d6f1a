"""The stored form of sparse coding matrices: coordinates and values (paper, Section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native, registered
from speedk.ops.mhsc import fits_heads, mhsc_reference
from speedk.ops.topk import fits_topk, select_natively, topk_mask_reference, why_not_native_topk


def index_dtype(size: int) -> torch.dtype:
    """The dtype that stores an index below `size`: uint8 up to 256, uint16 up to 65,536. Raises ValueError beyond."""
    if size > 65536:
        raise ValueError(f"an index below {size} does not fit 16 bits")
    return torch.uint8 if size <= 256 else torch.uint16


@dispatch.public
def coo_encode(scm: Tensor, k: int, *, check: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each (image, head) as values and coordinates, in order of j K + k: what is stored of the
    bar-A of Eq. 6.

    Differentiable any number of times in the values.

    scm: [N, H, J, K] floating, any strides, J and K at most 65,536. Returns values [N, H, k] of scm's dtype, rows
    [N, H, k] (patches, below J) and cols [N, H, k] (tokens, below K); both indices share one dtype, uint8 where J and K
    are at most 256, else uint16. k, ties and `check` as for `topk_mask`.
    Raises ValueError for k outside [0, J K], for J or K above 65,536 or, where checked, for a NaN.
    Backends: native (CPU, CUDA), torch.
    """
    _fits_encode(scm, k)
    backend = _encode.choose(scm, k)
    check = dispatch.checks(check, backend, scm)
    if backend == "torch":
        return coo_encode_reference(scm, k, check)
    return _coo_encode(scm, k, check, backend)


def coo_encode_reference(scm: Tensor, k: int, check: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    n, h, j, tokens = scm.shape
    # A stable sort puts the kept positions first, in their order; `nonzero` would break a compiled graph.
    mask = topk_mask_reference(scm, k, check).reshape(n, h, j * tokens)
    flat = mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :k]
    dtype = index_dtype(max(j, tokens))
    width = max(tokens, 1)
    return scm.reshape(n, h, j * tokens).gather(-1, flat), (flat // width).to(dtype), (flat % width).to(dtype)


@dispatch.public
def coo_decode(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, *, check: bool | None = None) -> Tensor:
    """The dense codes [N, H, J, K] of stored entries (Section 2.2); zero elsewhere. Entries of one coordinate add up.

    Differentiable any number of times in the values.

    values: [N, H, k] floating; rows, cols: [N, H, k] of an integer dtype, below J and below K; any strides, any order.
    check: whether an index out of range is looked for, which waits for the GPU; the default is that of `topk_mask`.
    Where it is not, such an entry is left out; memory out of bounds is never touched.
    Raises ValueError where shapes or dtypes do not fit or, where checked, an index is out of range.
    Backends: Triton, native (CPU; float32 and float64), torch.
    """
    _fits(values, rows, cols, J, K)
    backend = _decode.choose(values, rows, cols)
    return _dense(values, rows, cols, J, K, dispatch.checks(check, backend, values), backend)


def _dense(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, check: bool, backend: str) -> Tensor:
    if backend == "torch":
        return coo_decode_reference(values, rows, cols, J, K, check)
    return _coo_decode(values, rows, cols, J, K, check, backend)


def coo_decode_reference(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, check: bool = True) -> Tensor:
    rows, cols = rows.long(), cols.long()
    inside = (rows >= 0) & (rows < J) & (cols >= 0) & (cols < K)
    if check and not inside.all():
        raise _out_of_range(J, K)
    n, h, _ = values.shape
    flat = torch.where(inside, rows * K + cols, 0)
    dense = values.new_zeros(n, h, max(J * K, 1)).scatter_add(-1, flat, torch.where(inside, values, 0))
    return dense[..., :J * K].reshape(n, h, J, K)


@dispatch.public
def mhsc_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int, *, check: bool | None = None) -> Tensor:
    """`mhsc` (Eq. 3) from stored entries: mhsc(coo_decode(values, rows, cols, J, K), saet), without the dense codes.

    Differentiable once in values and saet (any number of times on the torch backend).

    saet: [K, D] of the dtype of values, D a multiple of H; the rest and `check` as for `coo_decode`.
    Returns [N, J, D]. Where saet is not finite, so are the results of the entries that use it; on the torch backend,
    whose dense product multiplies it by every zero, all results of its column are NaN.
    Raises ValueError where shapes, dtypes or devices do not fit or, where checked, an index is out of range.
    Backends: Triton, native (CPU; float32 and float64), torch.
    """
    fits_mhsc_coo(values, rows, cols, saet, J)
    backend = _mhsc.choose(values, rows, cols, saet)
    check = dispatch.checks(check, backend, values)
    if backend == "torch":
        return mhsc_coo_reference(values, rows, cols, saet, J, check)
    return _mhsc_coo(values, rows, cols, saet, J, check, backend)


def mhsc_coo_reference(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int, check: bool = True) -> Tensor:
    return mhsc_reference(coo_decode_reference(values, rows, cols, J, saet.shape[0], check), saet)


def _fits(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int) -> None:
    if values.ndim != 3:
        raise ValueError(f"values must be [N, H, k], got {tuple(values.shape)}")
    indices = {"rows": rows, "cols": cols}
    for name, index in indices.items():
        if index.shape != values.shape:
            raise ValueError(f"{name} must be {tuple(values.shape)} like values, got {tuple(index.shape)}")
    arguments.alike(values=values, indices=indices)
    if J < 0 or K < 0:
        raise ValueError(f"J={J} and K={K} cannot be negative")


def fits_mhsc_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int) -> None:
    if saet.ndim != 2:
        raise ValueError(f"saet must be [K, D], got {tuple(saet.shape)}")
    _fits(values, rows, cols, J, saet.shape[0])
    fits_heads(saet, values.shape[1])
    arguments.alike(values=values, saet=saet)


def _fits_encode(scm: Tensor, k: int) -> None:
    fits_topk(scm, k)
    index_dtype(max(scm.shape[2:]))


def _out_of_range(J: int, K: int) -> ValueError:
    return ValueError(f"an index is out of range: rows must be below J={J} and cols below K={K}")


def why_not_native(values: Tensor, rows: Tensor, cols: Tensor, *saet: Tensor) -> str | None:
    if values.dtype not in native.WIDE:
        return f"{values.dtype} is computed in PyTorch"
    if rows.dtype != cols.dtype or rows.dtype not in (torch.uint8, torch.uint16):
        return f"indices are {rows.dtype} and {cols.dtype}, the kernel takes uint8 or uint16"
    return dispatch.why_not_native_cpu(values, rows, cols, *saet)


def why_not_triton(values: Tensor, rows: Tensor, cols: Tensor, *saet: Tensor) -> str | None:
    for index in (rows, cols):
        if index.dtype in (torch.uint32, torch.uint64):
            return f"{index.dtype} indices are looked up in PyTorch"
    return dispatch.why_not_triton(values, rows, cols, *saet)


_encode = dispatch.Op("coo_encode", native=why_not_native_topk, cuda=True)
_decode = dispatch.Op("coo_decode", triton=why_not_triton, native=why_not_native)
_mhsc = dispatch.Op("mhsc_coo", triton=why_not_triton, native=why_not_native)


@registered.custom_op("speedk::coo_encode")
def _coo_encode(scm: Tensor, k: int, check: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _fits_encode(scm, k)
    values, rows, cols = _encoded(scm, k)
    select_natively(scm, k, check, values=values, rows=rows, cols=cols)
    return values, rows, cols


@_coo_encode.register_fake
def _(scm: Tensor, k: int, check: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _encoded(scm, k)


def _encoded(scm: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = (*scm.shape[:2], k), index_dtype(max(scm.shape[2:]))
    rows, cols = (torch.empty(shape, dtype=dtype, device=scm.device) for _ in range(2))
    return torch.empty(shape, dtype=scm.dtype, device=scm.device), rows, cols


def _encode_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.size = inputs[0].shape[2:]


def _encode_backward(ctx, d_values: Tensor, *none: None):
    rows, cols = ctx.saved_tensors
    backend = _decode.prefer(d_values, rows, cols)
    return _dense(d_values, rows, cols, *ctx.size, False, backend), None, None, None


_coo_encode.register_autograd(_encode_backward, setup_context=_encode_save)


@registered.custom_op("speedk::coo_decode")
def _coo_decode(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, check: bool, backend: str) -> Tensor:
    _fits(values, rows, cols, J, K)
    dense, bad = dispatch.launchers(backend, "coo").coo_decode_fwd(values, rows, cols, J, K, check)
    if check and bad:
        raise _out_of_range(J, K)
    return dense


@_coo_decode.register_fake
def _(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int, check: bool, backend: str) -> Tensor:
    return values.new_empty(*values.shape[:2], J, K)


@registered.custom_op("speedk::coo_decode_bwd")
def _coo_decode_bwd(d_dense: Tensor, rows: Tensor, cols: Tensor, backend: str) -> Tensor:
    J, K = d_dense.shape[2:]
    _fits(d_dense.new_empty(rows.shape), rows, cols, J, K)
    arguments.shaped("d_dense", d_dense, (*rows.shape[:2], J, K))
    return dispatch.launchers(backend, "coo").coo_decode_bwd(d_dense, rows, cols)


@_coo_decode_bwd.register_fake
def _(d_dense: Tensor, rows: Tensor, cols: Tensor, backend: str) -> Tensor:
    return d_dense.new_empty(rows.shape)


def _decode_save(ctx, inputs, output) -> None:
    _, rows, cols, ctx.J, ctx.K, _, ctx.backend = inputs
    ctx.save_for_backward(rows, cols)


def _decode_backward(ctx, d_dense: Tensor):
    return _coo_decode_bwd(d_dense, *ctx.saved_tensors, ctx.backend), *[None] * 6


def _decode_bwd_save(ctx, inputs, output) -> None:
    d_dense, rows, cols, ctx.backend = inputs
    ctx.save_for_backward(rows, cols)
    ctx.size = d_dense.shape[2:]


def _decode_double_backward(ctx, d_values: Tensor):
    return _coo_decode(d_values, *ctx.saved_tensors, *ctx.size, False, ctx.backend), None, None, None


_coo_decode.register_autograd(_decode_backward, setup_context=_decode_save)
_coo_decode_bwd.register_autograd(_decode_double_backward, setup_context=_decode_bwd_save)


@registered.custom_op("speedk::mhsc_coo")
def _mhsc_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int, check: bool, backend: str) -> Tensor:
    fits_mhsc_coo(values, rows, cols, saet, J)
    features, bad = dispatch.launchers(backend, "coo").mhsc_coo_fwd(values, rows, cols, saet, J, check)
    if check and bad:
        raise _out_of_range(J, saet.shape[0])
    return features


@_mhsc_coo.register_fake
def _(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int, check: bool, backend: str) -> Tensor:
    return values.new_empty(values.shape[0], J, saet.shape[1])


@registered.custom_op("speedk::mhsc_coo_bwd")
def _mhsc_coo_bwd(d_out: Tensor, values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, need_values: bool,
                  need_saet: bool, backend: str) -> tuple[Tensor, Tensor]:
    """d_values and d_saet, empty where not needed."""
    fits_mhsc_coo(values, rows, cols, saet, d_out.shape[1])
    arguments.shaped("d_out", d_out, (values.shape[0], d_out.shape[1], saet.shape[1]))
    arguments.alike(d_out=d_out, values=values)
    launch = dispatch.launchers(backend, "coo").mhsc_coo_bwd
    grads = launch(d_out, values, rows, cols, saet, need_values, need_saet)
    return tuple(values.new_empty(0) if grad is None else grad for grad in grads)


@_mhsc_coo_bwd.register_fake
def _(d_out: Tensor, values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, need_values: bool, need_saet: bool,
      backend: str) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape if need_values else 0), saet.new_empty(saet.shape if need_saet else 0)


def _mhsc_save(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _mhsc_backward(ctx, d_out: Tensor):
    need_values, _, _, need_saet, *_ = ctx.needs_input_grad
    d_values, d_saet = _mhsc_coo_bwd(d_out, *ctx.saved_tensors, need_values, need_saet, ctx.backend)
    return d_values if need_values else None, None, None, d_saet if need_saet else None, None, None, None


_mhsc_coo.register_autograd(_mhsc_backward, setup_context=_mhsc_save)
_mhsc_coo_bwd.ends("mhsc_coo")
