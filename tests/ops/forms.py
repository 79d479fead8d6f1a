"""The ops as one would write them in PyTorch without speedk, called alike: what results are measured against.

In float64 they are the truth, in the dtype of a result they say how close PyTorch comes in it. They share no line with
speedk.ops: a reference that rounds where it should not fails its own tests, and loosens those of no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mhsc(scm: Tensor, saet: Tensor) -> Tensor:
    width = saet.shape[1] // scm.shape[1]
    heads = [torch.einsum("njk,kd->njd", scm[:, h], saet[:, h * width:(h + 1) * width]) for h in range(scm.shape[1])]
    return torch.cat(heads, -1)


def coo_decode(values: Tensor, rows: Tensor, cols: Tensor, J: int, K: int) -> Tensor:
    n, h = (torch.arange(size, device=values.device) for size in values.shape[:2])
    at = n[:, None, None], h[None, :, None], rows.long(), cols.long()
    return values.new_zeros(*values.shape[:2], J, K).index_put(at, values, accumulate=True)


def mhsc_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, J: int) -> Tensor:
    return mhsc(coo_decode(values, rows, cols, J, saet.shape[0]), saet)


def patchify(images: Tensor, patch: int) -> Tensor:
    tokens = [images[:, :, y:y + patch, x:x + patch].permute(0, 2, 3, 1).flatten(1)
              for y in range(0, images.shape[2], patch) for x in range(0, images.shape[3], patch)]  # fmt: skip
    return torch.stack(tokens, 1)


def unpatchify(tokens: Tensor, channels: int, patch: int) -> Tensor:
    n, j, _ = tokens.shape
    side = round(j**0.5)
    pieces = [token.reshape(n, patch, patch, channels).permute(0, 3, 1, 2) for token in tokens.unbind(1)]
    return torch.cat([torch.cat(pieces[y * side:(y + 1) * side], -1) for y in range(side)], -2)


def tokens_to_images(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    return unpatchify(F.linear(state, weight, bias), channels, patch)


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Half precision in float32: PyTorch's own norm sums the gradients of its weights in what it is given."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    return F.layer_norm(total, x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def freenet_block(features: Tensor, state: Tensor | None, weights, norm: str = "branch") -> Tensor:
    proj, proj_b, norm1, norm1_b, fc1, fc1_b, fc2, fc2_b, norm2, norm2_b = weights
    branch = F.linear(features, proj, proj_b)
    hidden = add_layer_norm(branch, state if norm == "sum" else None, norm1, norm1_b)
    if norm == "branch" and state is not None:
        hidden = hidden + state
    mlp = F.linear(F.gelu(F.linear(hidden, fc1, fc1_b)), fc2, fc2_b)
    return add_layer_norm(mlp, hidden, norm2, norm2_b)


def freenet(scm: Tensor, saet: Tensor, weights) -> Tensor:
    return _decode(mhsc(scm, saet), weights)


def freenet_coo(values: Tensor, rows: Tensor, cols: Tensor, saet: Tensor, weights) -> Tensor:
    return _decode(mhsc_coo(values, rows, cols, saet, weights.patches), weights)


def _decode(features: Tensor, weights) -> Tensor:
    state = None
    for block in weights.blocks:
        state = freenet_block(features, state, block, weights.norm)
    return tokens_to_images(state, weights.weight, weights.bias, weights.channels, weights.patch)


def norm_act_pool(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(x, x.shape[1], weight, bias, eps)), 2)


def unroll_step(theta: Tensor, m: Tensor, gradient: Tensor, lr: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    m = m * momentum + gradient * (1 - momentum)
    return theta - m * lr, m


def unroll_step_adjoint(d_theta: Tensor, d_m: Tensor, m: Tensor, lr: Tensor, momentum: float) -> tuple[Tensor, ...]:
    """By autograd, through a step that gives this m: that of a gradient which is m already."""
    gradient, before, rate = (t.detach().clone().requires_grad_() for t in (m, m, lr))
    after = unroll_step(torch.zeros_like(m), before, gradient, rate, momentum)
    return torch.autograd.grad(after, (gradient, before, rate), (d_theta, d_m))
