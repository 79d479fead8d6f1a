"""LayerNorm of a sum, the norm of Eq. 4."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension of x + residual.

    x: [..., D] floating, any strides; residual: the same shape, or None for a plain LayerNorm;
    weight, bias: [D]; eps: added to the variance (1e-6 in SPEED). Returns [..., D].
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual is {tuple(residual.shape)}")
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight and bias must be [{x.shape[-1]}], got {tuple(weight.shape)} and {tuple(bias.shape)}")
    return add_layer_norm_reference(x, residual, weight, bias, eps)


def add_layer_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)
