"""Fold and unfold: images <-> tokens of one patch each (paper, Section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from speedk.ops import arguments, dispatch, native, native_linear, registered


@dispatch.public
def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into non-overlapping square patches, one token each.

    Tokens run row-major over the patch grid; the L = patch * patch * C values of a token are ordered
    (row, column, channel), channel fastest. Differentiable any number of times.

    images: [N, C, H, W] floating, any strides; H and W multiples of `patch`.
    Returns [N, J, L] with J = (H / patch) * (W / patch).
    Raises ValueError where `patch` does not divide the image.
    Backends: Triton, native (CPU), torch.
    """
    _fits_patchify(images, patch)
    backend = _fold.choose(images)
    if backend == "torch":
        return patchify_reference(images, patch)
    return _patchify(images, patch, backend)


def patchify_reference(images: Tensor, patch: int) -> Tensor:
    n, c, h, w = images.shape
    grid = images.reshape(n, c, h // patch, patch, w // patch, patch)
    ordered = grid.permute(0, 2, 4, 3, 5, 1).clone(memory_format=torch.contiguous_format)  # never a view of `images`
    return ordered.view(n, (h // patch) * (w // patch), patch * patch * c)


@dispatch.public
def unpatchify(tokens: Tensor, channels: int, patch: int) -> Tensor:
    """Put tokens back together into square images: the inverse of `patchify`. Differentiable any number of times.

    tokens: [N, J, L] floating, any strides; J a square number, L = patch * patch * channels.
    Returns [N, C, H, W] with H = W = patch * sqrt(J).
    Raises ValueError where J is not square or L does not fit.
    Backends: Triton, native (CPU), torch.
    """
    _fits_unpatchify(tokens, channels, patch)
    side = square_side(tokens.shape[1])
    backend = _unfold.choose(tokens)
    if backend == "torch":
        return unpatchify_reference(tokens, channels, patch)
    return _unpatchify(tokens, channels, patch, side, backend)


def unpatchify_reference(tokens: Tensor, channels: int, patch: int) -> Tensor:
    n, j, _ = tokens.shape
    side = square_side(j)
    grid = tokens.reshape(n, side, side, patch, patch, channels)
    ordered = grid.permute(0, 5, 1, 3, 2, 4).clone(memory_format=torch.contiguous_format)  # never a view of `tokens`
    return ordered.view(n, channels, side * patch, side * patch)


@dispatch.public
def tokens_to_images(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    """The last line of Eq. 4: project each token to its patch and put the patches together.

    Differentiable once (any number of times on the torch backend).

    state: [N, J, D] floating, any strides, J a square number; weight: [L, D]; bias: [L]; L = patch * patch * channels.
    Where D is 0, each patch is the bias.
    Returns [N, C, H, W] with H = W = patch * sqrt(J).
    Raises ValueError where the shapes or dtypes do not fit, or J is not a square number.
    Backends: Triton (its gradients in float32 by CUDA where there is a kernel for the sizes), native (CPU, float32),
    torch.
    """
    _fits_projection(state, weight, bias, channels, patch)
    backend = _project.choose(state, weight, bias, channels, patch)
    if backend == "torch":
        return tokens_to_images_reference(state, weight, bias, channels, patch)
    back = dispatch.way_back(backend, native_linear.why_not_projection, state, weight, patch)
    return _tokens_to_images(state, weight, bias, channels, patch, backend, back)


def tokens_to_images_reference(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> Tensor:
    return unpatchify_reference(linear(state, weight, bias), channels, patch)


def _at_least_one(state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """With a column of zeros where there are no features at all: a kernel multiplies over one at least."""
    return (state, weight) if state.shape[2] else (pad(state, (0, 1)), pad(weight, (0, 1)))


def _fits_patchify(images: Tensor, patch: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {tuple(images.shape)}")
    height, width = images.shape[2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide images of {height}x{width}")


def _fits_unpatchify(tokens: Tensor, channels: int, patch: int) -> None:
    length = patch_length(channels, patch)
    if tokens.ndim != 3 or tokens.shape[2] != length:
        raise ValueError(f"tokens must be [N, J, {length}] for {channels} channels and patch={patch}, "
                         f"got {tuple(tokens.shape)}")


def _fits_projection(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> None:
    length = patch_length(channels, patch)
    if state.ndim != 3 or weight.shape != (length, state.shape[-1]) or bias.shape != (length,):
        raise ValueError(f"state must be [N, J, D], weight [{length}, D] and bias [{length}] for {channels} channels "
                         f"and patch={patch}, got {tuple(state.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}")
    arguments.alike(state=state, weight=weight, bias=bias)
    square_side(state.shape[1])


def patch_length(channels: int, patch: int) -> int:
    """L, the values of a patch."""
    if channels < 0 or patch < 1:
        raise ValueError(f"channels={channels} and patch={patch}: a patch is at least one pixel wide")
    return patch * patch * channels


def square_side(patches: int) -> int:
    """The patches in a row of a square image of `patches`."""
    side = int(patches**0.5 + 0.5)
    if side * side != patches:
        raise ValueError(f"J={patches} patches do not make a square image")
    return side


def why_not_native(*tensors: Tensor) -> str | None:
    if tensors[0].dtype not in native.DTYPES:
        return f"{tensors[0].dtype} is moved in PyTorch"
    return dispatch.why_not_native_cpu(*tensors)


def why_not_native_product(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> str | None:
    if state.dtype != torch.float32:
        return f"{state.dtype} is computed in PyTorch"
    return dispatch.why_not_native_cpu(state, weight, bias)


WIDEST = 128
"""Values of a side of a patch that one program of the Triton kernel holds."""


def why_not_triton_product(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int) -> str | None:
    if patch > WIDEST:
        return f"patch={patch} is wider than the {WIDEST} that one program holds"
    return dispatch.why_not_triton(state, weight, bias)


_fold = dispatch.Op("patchify", triton=dispatch.why_not_triton, native=why_not_native)
_unfold = dispatch.Op("unpatchify", triton=dispatch.why_not_triton, native=why_not_native)
_project = dispatch.Op("tokens_to_images", triton=why_not_triton_product, native=why_not_native_product)


@registered.custom_op("speedk::patchify")
def _patchify(images: Tensor, patch: int, backend: str) -> Tensor:
    _fits_patchify(images, patch)
    return dispatch.launchers(backend, "patches").patchify_fwd(images, patch)


@_patchify.register_fake
def _(images: Tensor, patch: int, backend: str) -> Tensor:
    n, c, h, w = images.shape
    return images.new_empty(n, (h // patch) * (w // patch), patch * patch * c)


@registered.custom_op("speedk::unpatchify")
def _unpatchify(tokens: Tensor, channels: int, patch: int, width: int, backend: str) -> Tensor:
    _fits_unpatchify(tokens, channels, patch)
    if tokens.shape[1] % max(width, 1) or (tokens.shape[1] and width < 1):
        raise ValueError(f"J={tokens.shape[1]} patches do not make rows of {width}")
    return dispatch.launchers(backend, "patches").unpatchify_fwd(tokens, channels, patch, width)


@_unpatchify.register_fake
def _(tokens: Tensor, channels: int, patch: int, width: int, backend: str) -> Tensor:
    rows = tokens.shape[1] // width if width else 0
    return tokens.new_empty(tokens.shape[0], channels, rows * patch, width * patch)


def _patchify_save(ctx, inputs, output) -> None:
    images, ctx.patch, ctx.backend = inputs
    ctx.channels, ctx.width = images.shape[1], images.shape[3] // ctx.patch


def _patchify_backward(ctx, d_tokens: Tensor):
    return _unpatchify(d_tokens, ctx.channels, ctx.patch, ctx.width, ctx.backend), None, None


def _unpatchify_save(ctx, inputs, output) -> None:
    _, _, ctx.patch, _, ctx.backend = inputs


def _unpatchify_backward(ctx, d_images: Tensor):
    return _patchify(d_images, ctx.patch, ctx.backend), None, None, None, None


_patchify.register_autograd(_patchify_backward, setup_context=_patchify_save)
_unpatchify.register_autograd(_unpatchify_backward, setup_context=_unpatchify_save)


@registered.custom_op("speedk::tokens_to_images")
def _tokens_to_images(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int, backend: str,
                      back: str) -> Tensor:
    """`back`: the backend of the gradients."""
    _fits_projection(state, weight, bias, channels, patch)
    launch = dispatch.launchers(backend, "patches").tokens_to_images_fwd
    return launch(*_at_least_one(state, weight), bias, channels, patch)


@_tokens_to_images.register_fake
def _(state: Tensor, weight: Tensor, bias: Tensor, channels: int, patch: int, backend: str, back: str) -> Tensor:
    side = square_side(state.shape[1]) * patch
    return state.new_empty(state.shape[0], channels, side, side)


@registered.custom_op("speedk::tokens_to_images_bwd")
def _tokens_to_images_bwd(d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool,
                          need_weight: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """d_state, d_weight and d_bias, empty where not needed: the last two go together."""
    side = square_side(state.shape[1]) * patch
    _fits_projection(state, weight, weight.new_empty(len(weight)), d_images.shape[1], patch)
    arguments.shaped("d_images", d_images, (state.shape[0], d_images.shape[1], side, side))
    arguments.alike(d_images=d_images, state=state)
    launch = dispatch.launchers(backend, "patches", state.is_cuda).tokens_to_images_bwd
    grads = launch(d_images, *_at_least_one(state, weight), patch, need_state, need_weight)
    if not state.shape[2]:  # without the column again
        grads = (*(grad if grad is None else grad[..., :0].clone() for grad in grads[:2]), grads[2])
    return tuple(state.new_empty(0) if grad is None else grad for grad in grads)


@_tokens_to_images_bwd.register_fake
def _(d_images: Tensor, state: Tensor, weight: Tensor, patch: int, need_state: bool, need_weight: bool,
      backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return (state.new_empty(state.shape if need_state else 0), weight.new_empty(weight.shape if need_weight else 0),
            weight.new_empty(weight.shape[0] if need_weight else 0))  # fmt: skip


def _project_save(ctx, inputs, output) -> None:
    state, weight, _, _, ctx.patch, _, ctx.backend = inputs
    ctx.save_for_backward(state, weight)


def _project_backward(ctx, d_images: Tensor):
    need_state, need_weight, need_bias, *_ = ctx.needs_input_grad
    grads = _tokens_to_images_bwd(d_images, *ctx.saved_tensors, ctx.patch, need_state, need_weight or need_bias,
                                  ctx.backend)  # fmt: skip
    needed = zip(grads, (need_state, need_weight, need_bias))
    return *(grad if need else None for grad, need in needed), None, None, None, None


_tokens_to_images.register_autograd(_project_backward, setup_context=_project_save)
_tokens_to_images_bwd.ends("tokens_to_images")
