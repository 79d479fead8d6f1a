"""Students and evaluation networks: one file a network, built by name for a data set's geometry.

Every network has `forward(images [B, C, H, W], normalised) -> logits [B, classes]` and `features(images) -> [B, F]`,
the flattened embedding that its classifier reads. `per_sample = True` says that no operation mixes the samples of a
batch and that convolutions dominate, so that `speedk.unroll` trains it on pieces of a batch, in threads, or by CUDA
graphs.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speedk import registry
from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.networks import _own
from speedk.networks._convolution import Convolution
from speedk.precision import dtype_of

__all__ = ["build", "fresh", "given", "names", "parameter_count", "require_features", "set_precision",
           "student", "twice_differentiable"]

INTERFACE = nn.Module
"""What a file of this folder names as its PLUGIN, called with the geometry and keyword arguments."""

_SEEDED = threading.RLock()
"""Held while the global random state is on loan: networks that are trained side by side are also made side by side."""


def names() -> list[str]:
    """The networks of this folder."""
    return registry.names(sys.modules[__name__])


def given(name: str) -> str:
    """`name` back, which the user gave: a network of this folder, or "my.module:Net", which may be imported from here
    on. A name that was read from a file does not come here, so no file can name code to run.

    Raises ConfigError for a name that is neither.
    """
    if ":" in name:
        _own.allow(name)
    elif name not in names():
        raise ConfigError(f"network {name!r} is not one of {', '.join(names())}, nor module:Class"
                          f"{registry.nearest(name, names())}")
    return name


def build(name: str, geometry: Geometry, **overrides) -> nn.Module:
    """The network `name` for `geometry`, with torch's default initial values, on the CPU.

    `overrides` are the keyword arguments of that network (`depth`, `width`, ...); one of the user's own takes none.
    Raises ConfigError for an unknown name or argument, or a geometry the network cannot take.
    """
    if ":" in name:
        return _own.build(name, geometry)
    network = registry.find(sys.modules[__name__], name)
    known = [p for p in inspect.signature(network).parameters if p != "geometry"]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}, only {', '.join(known)}{registry.nearest(key, known)}")
    return network(geometry, **overrides)


def fresh(name: str, geometry: Geometry, seed: int, device: torch.device | str = "cpu", **overrides) -> nn.Module:
    """`build` with the initial values that `seed` gives, on `device`.

    They are drawn on the CPU, so they do not depend on the device; the global random state is left as it was. Raises
    ConfigError where nothing in it can be trained.
    """
    with _SEEDED, torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network = build(name, geometry, **overrides)
    if not any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"network {name} has no parameters to train")
    return network.to(device)


def student(name: str, geometry: Geometry, seed: int, device: torch.device | str = "cpu", features: bool = False,
            precision: str = "float32") -> nn.Module:
    """`fresh` for matching, where a batch is cut into pieces and a step must not depend on the global random state: no
    dropout. `precision` as for `set_precision`. Raises ConfigError for a network with BatchNorm, and, if `features` are
    wanted, for one without them."""
    network = set_precision(fresh(name, geometry, seed, device), name, precision)
    if features:
        require_features(name, network)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(f"network {name} cannot be a student: its BatchNorm mixes the images of a batch, "
                              "which is matched in pieces; use InstanceNorm or GroupNorm")
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return network


def set_precision(network: nn.Module, name: str, precision: str) -> nn.Module:
    """`network`, called `name`, whose convolutions and their derivatives round their operands and results to
    `precision`, a name of speedk.precision; all else stays float32. Raises ConfigError where there is none that can."""
    convolutions = [module for module in network.modules() if isinstance(module, Convolution)]
    if precision != "float32" and not convolutions:
        raise ConfigError(f"precision={precision} is for networks of speedk's convolutions (convnet, resnet18), which "
                          f"{name} is not")
    for module in convolutions:
        module.precision = None if precision == "float32" else dtype_of(precision)
    return network


def require_features(name: str, network: nn.Module) -> None:
    """Raise ConfigError where `network`, called `name`, has no embedding to give."""
    if not callable(getattr(network, "features", None)):
        raise ConfigError(f"network {name} has no method features(images) that gives an embedding [B, F], which is "
                          "needed here")


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, every network of this folder can be differentiated twice: torch's fused attention can be once."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def parameter_count(network: nn.Module) -> int:
    """Learned numbers of a network."""
    return sum(p.numel() for p in network.parameters())
