"""Multi-head sparse coding before its projection (paper, Eq. 3)."""

from __future__ import annotations

from torch import Tensor

from speedk.ops import arguments, dispatch, native, native_linear, registered


@dispatch.public
def mhsc(scm: Tensor, saet: Tensor) -> Tensor:
    """Combine the epitomic tokens by the codes, head by head, and lay the heads side by side.

    Head h of the result is scm[:, h] @ saet[:, h D/H : (h+1) D/H]: the paper's [E^1 A^1, ..., E^H A^H] of Eq. 3,
    transposed (a token a row). Differentiable once (any number of times on the torch backend).

    scm: [N, H, J, K] floating, any strides; saet: [K, D] of the same dtype, any strides, D a multiple of H.
    Returns [N, J, D]. Raises ValueError where the shapes or dtypes do not fit.
    Backends: Triton (its gradients in float32 by CUDA where there is a kernel for the sizes), native (CPU; float32 and
    float64), torch.
    """
    fits_mhsc(scm, saet)
    backend = _op.choose(scm, saet)
    if backend == "torch":
        return mhsc_reference(scm, saet)
    return _mhsc(scm, saet, backend, dispatch.way_back(backend, native_linear.why_not_mhsc, scm, saet))


def mhsc_reference(scm: Tensor, saet: Tensor) -> Tensor:
    n, h, j, k = scm.shape
    pools = saet.reshape(k, h, saet.shape[1] // h).transpose(0, 1)  # [H, K, D/H]
    return (scm @ pools).transpose(1, 2).reshape(n, j, saet.shape[1])


def fits_mhsc(scm: Tensor, saet: Tensor) -> None:
    if scm.ndim != 4 or saet.ndim != 2:
        raise ValueError(f"scm must be [N, H, J, K] and saet [K, D], got {tuple(scm.shape)} and {tuple(saet.shape)}")
    if scm.shape[3] != saet.shape[0]:
        raise ValueError(f"saet has K={saet.shape[0]} tokens but scm has K={scm.shape[3]} columns")
    fits_heads(saet, scm.shape[1])
    arguments.alike(scm=scm, saet=saet)


def fits_heads(saet: Tensor, heads: int) -> None:
    if heads == 0 or saet.shape[1] % heads:
        raise ValueError(f"D={saet.shape[1]} is not a multiple of H={heads} heads")


WIDEST = 256
"""Values of a head that one program of the Triton kernel holds."""


def why_not_native(scm: Tensor, saet: Tensor) -> str | None:
    if scm.dtype not in native.WIDE:
        return f"{scm.dtype} is computed in PyTorch"
    return dispatch.why_not_native_cpu(scm, saet)


def why_not_triton(scm: Tensor, saet: Tensor) -> str | None:
    width = saet.shape[1] // scm.shape[1]
    if width > WIDEST:
        return f"heads of width {width} are wider than the {WIDEST} that one program holds"
    return dispatch.why_not_triton(scm, saet)


_op = dispatch.Op("mhsc", triton=why_not_triton, native=why_not_native)


@registered.custom_op("speedk::mhsc")
def _mhsc(scm: Tensor, saet: Tensor, backend: str, back: str) -> Tensor:
    """`back`: the backend of the gradients."""
    fits_mhsc(scm, saet)
    return dispatch.launchers(backend, "mhsc").mhsc_fwd(scm, saet)


@_mhsc.register_fake
def _(scm: Tensor, saet: Tensor, backend: str, back: str) -> Tensor:
    return scm.new_empty(scm.shape[0], scm.shape[2], saet.shape[1])


@registered.custom_op("speedk::mhsc_bwd")
def _mhsc_bwd(d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool, need_saet: bool,
              backend: str) -> tuple[Tensor, Tensor]:
    fits_mhsc(scm, saet)
    arguments.shaped("d_out", d_out, (scm.shape[0], scm.shape[2], saet.shape[1]))
    arguments.alike(d_out=d_out, scm=scm)
    launch = dispatch.launchers(backend, "mhsc", scm.is_cuda).mhsc_bwd
    grads = launch(d_out, scm, saet, need_scm, need_saet)
    return tuple(scm.new_empty(0) if grad is None else grad for grad in grads)


@_mhsc_bwd.register_fake
def _(d_out: Tensor, scm: Tensor, saet: Tensor, need_scm: bool, need_saet: bool,
      backend: str) -> tuple[Tensor, Tensor]:
    return scm.new_empty(scm.shape if need_scm else 0), saet.new_empty(saet.shape if need_saet else 0)


def _save(ctx, inputs, output) -> None:
    scm, saet, _, ctx.backend = inputs
    ctx.save_for_backward(scm, saet)


def _backward(ctx, d_out: Tensor):
    need_scm, need_saet, *_ = ctx.needs_input_grad
    d_scm, d_saet = _mhsc_bwd(d_out, *ctx.saved_tensors, need_scm, need_saet, ctx.backend)
    return d_scm if need_scm else None, d_saet if need_saet else None, None, None


_mhsc.register_autograd(_backward, setup_context=_save)
_mhsc_bwd.ends("mhsc")
