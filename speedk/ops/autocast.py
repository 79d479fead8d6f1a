"""Ops under autocast: they compute as they would outside, whatever their backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def in_the_widest(function: Callable) -> Callable:
    """`function`, which under autocast computes as it would outside, in the widest floating dtype among its
    arguments."""

    @functools.wraps(function)
    def op(*arguments: object, **keywords: object) -> object:
        kind = _autocast_for((*arguments, *keywords.values()))
        if kind is None:
            return function(*arguments, **keywords)
        dtypes = {t.dtype for t in _tensors((arguments, tuple(keywords.values()))) if t.is_floating_point()}
        widest = functools.reduce(torch.promote_types, dtypes)
        with torch.autocast(kind, enabled=False):
            return function(*_cast(arguments, widest), **{name: _cast(x, widest) for name, x in keywords.items()})

    return op


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """A constant to `torch.compile`, which in PyTorch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(kind)


def _autocast_for(arguments: tuple) -> str | None:
    """The kind of device of the first floating tensor, where autocast is on for it."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            kind = argument.device.type
            on = _has_autocast(kind) and torch.is_autocast_enabled(kind)
            return kind if on else None
    return None


def _tensors(argument: object) -> list[Tensor]:
    """The tensors of an op's arguments, which may hold them in tuples and lists."""
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)] if isinstance(argument, (tuple, list)) else []


def _cast(argument: object, dtype: torch.dtype) -> object:
    if isinstance(argument, Tensor):
        return argument.to(dtype) if argument.is_floating_point() else argument
    if isinstance(argument, (tuple, list)):
        parts = [_cast(part, dtype) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else type(argument)(parts)
    return argument
