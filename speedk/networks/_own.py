"""Networks of the user's own: "my.module:Net", a class that is called as Net(channels, classes, resolution).

The module is one that Python finds, in the current folder too. The network takes images [B, channels, resolution,
resolution], normalised, and gives logits [B, classes]; with a method features(images) -> [B, F] it can be a student of
distribution matching and choose coresets.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from speedk.errors import ConfigError, one_line
from speedk.geometry import Geometry

_allowed: set[str] = set()


def allow(name: str) -> None:
    """Let `build` import `name`: the user has said it."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
        raise ConfigError(f"network {name!r} is not module:Class, as in my.module:Net")
    _allowed.add(name)


def build(name: str, geometry: Geometry) -> nn.Module:
    """The network `name` for `geometry`, checked on two images. Raises ConfigError, one line, for all that is wrong
    with it."""
    if name not in _allowed:
        raise ConfigError(f"network {name!r} is code of your own, which is imported only where you name it yourself: "
                          f"say network={name}")
    network = _call(name, _find(name), geometry.channels, geometry.classes, geometry.resolution)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} gives a {type(network).__name__}, not a torch.nn.Module")
    images = torch.zeros(2, geometry.channels, geometry.resolution, geometry.resolution)
    mode = network.training
    with torch.no_grad():
        logits = _call(name, network.eval(), images)
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, geometry.classes):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"{name} gives {found} for two images, not logits of shape [2, {geometry.classes}]")
    return network.train(mode)


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file here must not take the place of an installed package
    try:
        found = importlib.import_module(module)
    except Exception as error:  # what other code raises can be anything
        raise ConfigError(f"network {name!r}: importing {module} failed: {_line(error)}") from error
    if not hasattr(found, attribute):
        raise ConfigError(f"network {name!r}: {module} has no {attribute!r}")
    return getattr(found, attribute)


def _call(name: str, target: Any, *arguments: Any) -> Any:
    try:
        return target(*arguments)
    except Exception as error:
        if isinstance(target, nn.Module):
            shape = list(arguments[0].shape[1:])
            raise ConfigError(f"{name} fails on two images of {shape}: {_line(error)}") from error
        shown = ", ".join(map(str, arguments))
        raise ConfigError(f"{name}({shown}), its channels, classes and resolution, fails: {_line(error)}") from error


def _line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
