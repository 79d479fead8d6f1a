"""Networks of the user's own: "my.module:Net", a class or function that gives a torch.nn.Module.

The module is one that Python finds, in the current folder too. Net gets what it has parameters for, by their names: see
`NAMES`. The network takes images [B, channels, resolution, resolution], normalised, and gives logits [B, classes]; with
a method features(images) -> [B, F] it can be a student of distribution matching and choose coresets.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import torch
from torch import nn

from speedk.errors import ConfigError, one_line
from speedk.geometry import Geometry

NAMES = {"channels": ("in_channels", "in_chans", "channels"), "classes": ("num_classes", "n_classes", "classes"),
         "resolution": ("image_size", "img_size", "resolution")}
"""What a network of the user's own may call the three numbers of a geometry; the first that it has is taken."""

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
    network = _made(name, _find(name), geometry)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} gives a {type(network).__name__}, not a torch.nn.Module")
    images = torch.zeros(2, geometry.channels, geometry.resolution, geometry.resolution)
    mode = network.training
    with torch.no_grad():
        try:
            logits = network.eval()(images)
        except Exception as error:  # what other code raises can be anything
            raise ConfigError(f"{name} fails on two images of {list(images.shape[1:])}: {_line(error)}") from error
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


def _made(name: str, target: Any, geometry: Geometry) -> Any:
    """What `target` gives for the geometry: called with the numbers that it has names for; where it names none, but
    takes three, with channels, classes and resolution in this order."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is no class or function that can be called: {_line(error)}") from error
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    found = {next((known for known in names if known in named), None): getattr(geometry, role)
             for role, names in NAMES.items()}
    found.pop(None, None)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in needed if p.name not in found]
    given: tuple[int, ...] = ()
    if not found and len(missing) == 3 and all(p.kind is not p.KEYWORD_ONLY for p in needed):
        given, missing = (geometry.channels, geometry.classes, geometry.resolution), []
    if missing:
        raise ConfigError(f"{name} needs {', '.join(missing)}, and gets by name only in_channels, num_classes and "
                          "image_size (or channels, classes and resolution): give the others defaults")
    try:
        return target(*given, **found)
    except Exception as error:  # what other code raises can be anything
        shown = ", ".join([*map(str, given), *(f"{key}={value}" for key, value in found.items())])
        raise ConfigError(f"{name}({shown}) fails: {_line(error)}") from error


def _line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
