"""The students' convolution, with second derivatives that cost what they have to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedk.ops.dispatch import transformed

AS_A_CONVOLUTION = {"cuda"}
"""Devices where the gradient in an input of fewer than FEW channels, such as images, is a convolution of d_out with the
weight turned round: of cuDNN's deterministic ways to that gradient those for few channels are slow, at 128 pixels
a side and 3 channels two fifths of a student's whole step."""
FEW = 16


class Convolution(nn.Conv2d):
    """`nn.Conv2d` without dilation, groups or padding modes; differentiable any number of times.

    A convolution, its gradient in the input and its gradient in the weight are bilinear, and the derivatives of each
    are the other two. PyTorch's second derivatives run the weight's part as a convolution with a kernel as large as the
    image, which takes up to twice the time; and its first ones, on the CPU, follow the layout of the input, of
    which none is best for all three.

    precision: the type that the operands of all of these products are rounded to, and their results, while parameters,
    activations and gradients stay as they are; None: they are not rounded.
    """

    precision: torch.dtype | None = None

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """`add_bias=False`: without the bias, which still has a gradient: zeros, as where what follows takes each
        channel's mean away. (Not where PyTorch's own convolution runs, under a transform or autocast.)"""
        if transformed() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        how = _How(self.stride, self.padding, x.shape, self.weight.shape, self.precision or x.dtype, add_bias)
        if not torch.is_grad_enabled():
            return _convolved(x, self.weight, self.bias, how)
        return _convolve(x, self.weight, self.bias, how)


class _How(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    x: torch.Size
    weight: torch.Size
    precision: torch.dtype
    add_bias: bool

    def out(self) -> list[int]:
        sides = [(side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in
                 zip(self.x[2:], self.padding, self.weight[2:], self.stride, strict=True)]
        return [self.x[0], self.weight[0], *sides]


def _layout(device: torch.device, channels: int) -> torch.memory_format:
    """On the CPU channels last, which oneDNN convolves as it lies, where it copies any other; a single
    plane, whose layouts are one, is faster as the other."""
    return torch.channels_last if device.type == "cpu" and channels > 1 else torch.contiguous_format


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    layout = _layout(x.device, how.weight[1])
    dtype, bias = x.dtype, bias.to(how.precision) if bias is not None and how.add_bias else None
    x, weight = (tensor.to(how.precision).contiguous(memory_format=layout) for tensor in (x, weight))
    return F.conv2d(x, weight, bias, how.stride, how.padding).to(dtype).contiguous(memory_format=layout)


def _backward(d_out: Tensor, x: Tensor | None, weight: Tensor | None, how: _How,
              mask: list[bool]) -> tuple[Tensor, ...]:
    layout = _layout(d_out.device, how.weight[1])
    x, weight = (
        torch.empty(shape, dtype=how.precision, device=d_out.device, memory_format=layout) if tensor is None
        else tensor.to(how.precision).contiguous(memory_format=layout)
        for tensor, shape in ((x, how.x), (weight, how.weight)))
    rounded = d_out.to(how.precision).contiguous(memory_format=layout)
    gradients = torch.ops.aten.convolution_backward(rounded, x, weight, None, how.stride, how.padding, [1, 1], False,
                                                    [0, 0], 1, mask)
    return tuple(None if gradient is None else gradient.to(d_out.dtype) for gradient in gradients)


def _input_gradient(d_out: Tensor, weight: Tensor, how: _How) -> Tensor:
    padding = tuple(kernel - 1 - pad for kernel, pad in zip(how.weight[2:], how.padding, strict=True))
    if d_out.device.type not in AS_A_CONVOLUTION or how.stride != (1, 1) or how.weight[1] >= FEW or min(padding) < 0:
        return _backward(d_out, None, weight, how, [True, False, False])[0]
    turned = weight.transpose(0, 1).flip(2, 3)
    return _convolved(d_out, turned, None, how._replace(padding=padding, x=d_out.shape, weight=turned.shape))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    # The weight in a tuple, where autograd does not see it: nothing flows to it through the link.
    link = _Link.apply(x, (weight,), how) if x.requires_grad else None
    return _Convolve.apply(x, weight, bias, link, how)


class _Link(torch.autograd.Function):
    """Carries the gradient of an output back to x. A node of its own, which takes no part in the forward pass, so that
    autograd leaves it out where nobody asked for the gradient of x: that of images, while a student trains on them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: tuple[Tensor], how: _How) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.how = how
        return x.new_empty(1).expand(how.out())

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return _InputGradient.apply(d_out, ctx.saved_tensors[0], ctx.how), None, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, link: Tensor | None, how: _How) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return _convolved(x, weight, bias, how)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        _, need_weight, need_bias, linked, _ = ctx.needs_input_grad
        d_weight = _WeightGradient.apply(d_out, ctx.saved_tensors[0], ctx.how) if need_weight else None
        d_bias = None
        if need_bias:
            d_bias = d_out.sum((0, 2, 3)) if ctx.how.add_bias else d_out.new_zeros(d_out.shape[1])
        return None, d_weight, d_bias, d_out if linked else None, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, d_out: Tensor, weight: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(d_out, weight)
        ctx.how = how
        return _input_gradient(d_out, weight, how)

    @staticmethod
    def backward(ctx, along: Tensor):
        d_out, weight = ctx.saved_tensors
        need_out, need_weight, _ = ctx.needs_input_grad
        return (_convolve(along, weight, None, ctx.how) if need_out else None,
                _WeightGradient.apply(d_out, along, ctx.how) if need_weight else None, None)


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, d_out: Tensor, x: Tensor, how: _How) -> Tensor:
        ctx.save_for_backward(d_out, x)
        ctx.how = how
        return _backward(d_out, x, None, how, [False, True, False])[1]

    @staticmethod
    def backward(ctx, along: Tensor):
        d_out, x = ctx.saved_tensors
        need_out, need_x, _ = ctx.needs_input_grad
        return (_convolve(x, along, None, ctx.how) if need_out else None,
                _InputGradient.apply(d_out, along, ctx.how) if need_x else None, None)
