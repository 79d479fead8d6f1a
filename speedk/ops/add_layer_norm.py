"""LayerNorm of a sum, the norm of Eq. 4."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm

from speedk.ops import arguments, dispatch, registered
from speedk.ops.native import computed_in


@dispatch.public
def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension of x + residual.

    Differentiable once in x, residual, weight and bias (any number of times on the torch backend).

    x: [..., D] floating, any strides; residual: the same shape and dtype, or None for a plain LayerNorm;
    weight, bias: [D] of the same dtype; eps: added to the variance (1e-6 in SPEED). Returns [..., D] of x's dtype.
    Raises ValueError where the shapes, dtypes or devices do not fit.
    Backends: Triton, torch.
    """
    _fits(x, residual, weight, bias)
    backend = _op.choose(x, residual, weight, bias)
    if backend == "torch":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return _add_layer_norm(x, residual, weight, bias, eps)


def add_layer_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = computed_in(x.dtype)
    if wide != x.dtype:  # on the CPU PyTorch's norm sums d_weight and d_bias in the dtype that it is given
        return add_layer_norm_reference(x.to(wide), residual, weight.to(wide), bias.to(wide), eps).to(x.dtype)
    return layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)


def _fits(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual is {tuple(residual.shape)}")
    if x.ndim == 0 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)}, so weight and bias must be {list(x.shape[-1:])}, "
                         f"got {tuple(weight.shape)} and {tuple(bias.shape)}")
    arguments.alike(x=x, residual=residual, weight=weight, bias=bias)


WIDEST = 16384
"""Values of a row that one program of the Triton kernel holds."""


def why_not_triton(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> str | None:
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} values are wider than the {WIDEST} that one program holds"
    return dispatch.why_not_triton(*tensors)


_op = dispatch.Op("add_layer_norm", triton=why_not_triton)


@registered.custom_op("speedk::add_layer_norm")
def _add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    _fits(x, residual, weight, bias)
    return dispatch.launchers("triton", "add_layer_norm").add_layer_norm_fwd(x, residual, weight, bias, eps)


@_add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@registered.custom_op("speedk::add_layer_norm_bwd")
def _add_layer_norm_bwd(d_out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor,
                        eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _fits(x, residual, weight, weight)
    arguments.shaped("d_out", d_out, x.shape)
    arguments.alike(d_out=d_out, x=x)
    return dispatch.launchers("triton", "add_layer_norm").add_layer_norm_bwd(d_out, x, residual, weight, eps)


@_add_layer_norm_bwd.register_fake
def _(d_out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, residual, weight)


def _backward(ctx, d_out: Tensor):
    d_x, d_weight, d_bias = _add_layer_norm_bwd(d_out, *ctx.saved_tensors, ctx.eps)
    return d_x, None if ctx.saved_tensors[1] is None else d_x, d_weight, d_bias, None


_add_layer_norm.register_autograd(_backward, setup_context=_save)
_add_layer_norm_bwd.ends("add_layer_norm")
