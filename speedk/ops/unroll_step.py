"""One step of SGD with an averaged gradient, and its adjoint: what an unrolled training step does to the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from speedk.ops import arguments, dispatch, native, registered


@dispatch.public
def unroll_step(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """m' = momentum m + (1 - momentum) gradient; theta' = theta - lr m'. Momentum 0 is plain SGD.

    theta, m, gradient: [P] float, any strides; lr: [] of the same dtype, on the same device (it is not waited for).
    Returns theta' and m' [P]. Differentiable once, by `unroll_step_adjoint` (any number of times on the torch backend).
    Raises ValueError where shapes, dtypes or devices do not fit.
    Backends: native (CPU and CUDA; float32 and float64), torch.
    """
    _fits(lr, theta=theta, m=m, gradient=gradient)
    backend = _op.choose(theta, m, gradient, lr)
    if backend == "torch":
        return unroll_step_reference(theta, m, gradient, lr, momentum)
    return _unroll_step(theta, m, gradient, lr, momentum, backend)


@dispatch.public
def unroll_step_adjoint(d_theta: Tensor, d_m: Tensor, m: Tensor | None, lr: Tensor,
                        momentum: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients before a step, from those after it: (d_gradient [P], d_m [P], d_lr []).

    With q = d_m - lr d_theta: d_gradient = (1 - momentum) q, d_m = momentum q, d_lr = -<d_theta, m>. That of theta is
    d_theta itself.

    d_theta, d_m: [P] float, any strides, with respect to what the step returned; m: [P], as the step returned it, or
    None where d_lr is not wanted, which is then 0; lr: [] of the same dtype. d_lr is summed in an order that depends
    on P alone. Not differentiable on the native backend.
    Raises ValueError where shapes, dtypes or devices do not fit.
    Backends: native (CPU and CUDA; float32 and float64), torch.
    """
    _fits(lr, d_theta=d_theta, d_m=d_m, m=m)
    backend = _adjoint_op.choose(d_theta, d_m, m, lr)
    if backend == "torch":
        return unroll_step_adjoint_reference(d_theta, d_m, m, lr, momentum)
    return _unroll_step_adjoint(d_theta, d_m, m, lr, momentum, backend)


def unroll_step_reference(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor,
                          momentum: float) -> tuple[Tensor, Tensor]:
    m = momentum * m + (1 - momentum) * gradient
    return theta - lr * m, m


def unroll_step_adjoint_reference(d_theta: Tensor, d_m: Tensor, m: Tensor | None, lr: Tensor,
                                  momentum: float) -> tuple[Tensor, Tensor, Tensor]:
    q = d_m - lr * d_theta
    d_lr = torch.zeros_like(lr) if m is None else -(d_theta.double() * m.double()).sum().to(lr.dtype)
    return (1 - momentum) * q, momentum * q, d_lr


def _fits(lr: Tensor, **vectors: Tensor | None) -> None:
    first = next(iter(vectors.values()))
    for name, tensor in vectors.items():
        if tensor is not None and (tensor.ndim != 1 or tensor.shape != first.shape):
            raise ValueError(f"{', '.join(vectors)} must be [P] of one P, got {name} {tuple(tensor.shape)}")
    if lr.ndim:
        raise ValueError(f"lr must be a scalar, got {tuple(lr.shape)}")
    arguments.alike(**vectors, lr=lr)


def _why_not_native(*tensors: Tensor | None) -> str | None:
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].dtype not in native.WIDE:
        return f"{given[0].dtype} is computed in PyTorch"
    return dispatch.why_not_native(*given)


_op = dispatch.Op("unroll_step", native=_why_not_native, cuda=True)
_adjoint_op = dispatch.Op("unroll_step_adjoint", native=_why_not_native, cuda=True)


@registered.custom_op("speedk::unroll_step")
def _unroll_step(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor, momentum: float,
                 backend: str) -> tuple[Tensor, Tensor]:
    _fits(lr, theta=theta, m=m, gradient=gradient)
    return native.unroll_step_fwd(theta, m, gradient, lr, momentum)


@_unroll_step.register_fake
def _(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor, momentum: float, backend: str) -> tuple[Tensor, Tensor]:
    return theta.new_empty(theta.shape), m.new_empty(m.shape)


@registered.custom_op("speedk::unroll_step_adjoint")
def _unroll_step_adjoint(d_theta: Tensor, d_m: Tensor, m: Tensor | None, lr: Tensor, momentum: float,
                         backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _fits(lr, d_theta=d_theta, d_m=d_m, m=m)
    return native.unroll_step_bwd(d_theta, d_m, m, lr, momentum)


@_unroll_step_adjoint.register_fake
def _(d_theta: Tensor, d_m: Tensor, m: Tensor | None, lr: Tensor, momentum: float,
      backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return d_theta.new_empty(d_theta.shape), d_m.new_empty(d_m.shape), lr.new_empty(())


def _save(ctx, inputs, output) -> None:
    _, _, _, lr, ctx.momentum, ctx.backend = inputs
    ctx.save_for_backward(lr, output[1])


def _backward(ctx, d_theta: Tensor, d_m: Tensor):
    lr, m = ctx.saved_tensors
    d_gradient, d_before, d_lr = _unroll_step_adjoint(d_theta, d_m, m, lr, ctx.momentum, ctx.backend)
    return d_theta, d_before, d_gradient, d_lr, None, None


_unroll_step.register_autograd(_backward, setup_context=_save)
_unroll_step_adjoint.ends("unroll_step, of which unroll_step_adjoint is the derivative,")
