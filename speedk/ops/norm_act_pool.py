"""InstanceNorm, ReLU and average pooling: what stands between two convolutions of the ConvNet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, group_norm, relu

from speedk.ops import arguments, dispatch, native, registered


@dispatch.public
def norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """2x2 average pooling of ReLU of the affine InstanceNorm of x.

    The norm is per image and channel, (x - mean) / sqrt(var + eps) * weight + bias with the biased variance; an odd
    last row or column takes part in it and is left out of the pooling. Differentiable twice; a third time raises a
    RuntimeError (on the torch backend any number of times). A derivative's layout in memory is x's: channels last, or
    else contiguous.

    x: [B, C, H, W] floating, any strides, H and W at least 2; weight, bias: [C], of x's dtype; eps: added to the
    variance. Returns [B, C, H // 2, W // 2].
    Raises ValueError where the shapes or dtypes do not fit.
    Backends: native (CPU: float32 and float64; CUDA), torch.
    """
    _fits(x, weight, bias)
    backend = _op.choose(x, weight, bias)
    if backend == "torch":
        return norm_act_pool_reference(x, weight, bias, eps)
    return _norm_act_pool(x, weight, bias, eps, backend)[0]


def norm_act_pool_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # One channel a group is an instance norm, and on the CPU faster than F.instance_norm, which repeats its weights.
    return avg_pool2d(relu(group_norm(x, x.shape[1], weight, bias, eps)), 2)


def _fits(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"x must be [B, C, H, W] with H and W at least 2, got {tuple(x.shape)}")
    if weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(f"weight and bias must be [{x.shape[1]}], got {tuple(weight.shape)} and {tuple(bias.shape)}")
    arguments.alike(x=x, weight=weight, bias=bias)


def _fits_backward(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _fits(x, weight, bias)
    b, c, h, w = x.shape
    arguments.shaped("d_out", d_out, (b, c, h // 2, w // 2))
    arguments.alike(x=x, d_out=d_out)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        arguments.shaped(name, statistic, (b, c))
        if statistic.dtype != native.computed_in(x.dtype) or statistic.device != x.device:
            raise ValueError(f"{name} is {statistic.dtype} on {statistic.device}, but x {x.dtype} on {x.device}")


def _why_not_native(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in (native.DTYPES if x.is_cuda else native.WIDE):
        return f"{x.dtype} is computed in PyTorch"
    return dispatch.why_not_native(x, weight, bias)


_op = dispatch.Op("norm_act_pool", native=_why_not_native, cuda=True)


@registered.custom_op("speedk::norm_act_pool")
def _norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _fits(x, weight, bias)
    return dispatch.launchers(backend, "norm_act_pool").norm_act_pool_fwd(x, weight, bias, eps)


@_norm_act_pool.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = x.shape
    mean, rstd = (x.new_empty(b, c, dtype=native.computed_in(x.dtype)) for _ in range(2))
    return _empty(x, (b, c, h // 2, w // 2)), mean, rstd


@registered.custom_op("speedk::norm_act_pool_bwd")
def _norm_act_pool_bwd(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
                       backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _fits_backward(d_out, x, weight, bias, mean, rstd)
    return native.norm_act_pool_bwd(d_out, x, weight, bias, mean, rstd, eps)


@_norm_act_pool_bwd.register_fake
def _(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
      backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@registered.custom_op("speedk::norm_act_pool_bwd_bwd")
def _norm_act_pool_bwd_bwd(dd_x: Tensor, dd_weight: Tensor, dd_bias: Tensor, d_out: Tensor, x: Tensor, weight: Tensor,
                           bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
                           backend: str) -> tuple[Tensor, Tensor, Tensor]:
    _fits_backward(d_out, x, weight, bias, mean, rstd)
    for name, slope, like in (("dd_x", dd_x, x), ("dd_weight", dd_weight, weight), ("dd_bias", dd_bias, bias)):
        arguments.shaped(name, slope, like.shape)
        arguments.alike(x=x, **{name: slope})
    return native.norm_act_pool_bwd_bwd(dd_x, dd_weight, dd_bias, d_out, x, weight, bias, mean, rstd, eps)


@_norm_act_pool_bwd_bwd.register_fake
def _(dd_x: Tensor, dd_weight: Tensor, dd_bias: Tensor, d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
      mean: Tensor, rstd: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, d_out.shape), _empty(x, x.shape), weight.new_empty(weight.shape)


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=native.memory_format(x))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx, d_out: Tensor | None, d_mean: None, d_rstd: None):
    if d_out is None:
        return None, None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    return *_norm_act_pool_bwd(d_out, x, weight, bias, mean, rstd, ctx.eps, ctx.backend), None, None


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, dd_x: Tensor, dd_weight: Tensor, dd_bias: Tensor):
    # The statistics are functions of x, and d_x holds what comes through them; bias moves the ReLU's kinks alone.
    d_d_out, d_x, d_weight = _norm_act_pool_bwd_bwd(dd_x, dd_weight, dd_bias, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return d_d_out, d_x, d_weight, None, None, None, None, None


_norm_act_pool.register_autograd(_backward, setup_context=_save)
_norm_act_pool_bwd.register_autograd(_double_backward, setup_context=_save_backward)
_norm_act_pool_bwd_bwd.ends("norm_act_pool", "twice")
