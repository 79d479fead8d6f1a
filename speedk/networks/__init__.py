"""Students and evaluation networks: one file a network, built by name for a data set's geometry.

Every network has `forward(images [B, C, H, W], normalised) -> logits [B, classes]` and `features(images) -> [B, F]`,
the flattened embedding that its classifier reads. `per_sample = True` says that no operation mixes the samples of a
batch and that convolutions dominate, so that `speedk.unroll` trains it on pieces of a batch, in threads.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speedk import registry
from speedk.errors import ConfigError
from speedk.geometry import Geometry

__all__ = ["build", "fresh", "names", "parameter_count", "twice_differentiable"]


def names() -> list[str]:
    """The networks that `build` knows."""
    return registry.names(sys.modules[__name__])


def build(name: str, geometry: Geometry, **overrides) -> nn.Module:
    """The network `name` for `geometry`, with torch's default initial values, on the CPU.

    `overrides` are the keyword arguments of that network (`depth`, `width`, ...). Raises ConfigError for an unknown
    name or argument, or a geometry the network cannot take.
    """
    network = registry.find(sys.modules[__name__], name)
    known = [p for p in inspect.signature(network).parameters if p != "geometry"]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}, only {', '.join(known)}{registry.nearest(key, known)}")
    return network(geometry, **overrides)


def fresh(name: str, geometry: Geometry, seed: int, device: torch.device | str = "cpu", **overrides) -> nn.Module:
    """`build` with the initial values that `seed` gives, on `device`.

    They are drawn on the CPU, so they do not depend on the device; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network = build(name, geometry, **overrides)
    return network.to(device)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, every network of this folder can be differentiated twice: torch's fused attention can be once."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def parameter_count(network: nn.Module) -> int:
    """Learned numbers of a network."""
    return sum(p.numel() for p in network.parameters())
