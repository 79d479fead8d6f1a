"""A parameterization small enough to reason about: image = palette[index] * scale, with labels that may be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from speedk.distillation.parameterizations.base import Parameterization, ParameterizationSpec
from speedk.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Spec(ParameterizationSpec):
    colours: int = 300
    soft: bool = False
    gain: float = 1.0
    kind: str = "flat"
    limit: int | None = None

    def check(self, geometry) -> None:
        if not 1 <= self.colours <= 65536 or self.kind != "flat":
            raise ConfigError(f"colours={self.colours} or kind={self.kind!r} cannot be")


class Tiny(Parameterization):
    Spec = Spec
    name = "tiny"

    def __init__(self, spec, geometry, ipc, counts=None):
        super().__init__(spec, geometry, ipc)
        counts = [ipc] * geometry.classes if counts is None else counts
        self.register_buffer("classes", torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
        self.shape = (self.size, geometry.channels, geometry.resolution, geometry.resolution)
        self.palette = nn.Parameter(torch.linspace(-1, 1, spec.colours))
        index = torch.arange(self.size * geometry.pixels) * 7919 % spec.colours
        self.index = index.to(torch.uint16).reshape(self.shape)
        self.soft = nn.Parameter(torch.eye(geometry.classes)[self.classes] * 0.9) if spec.soft else None

    def initialise(self, real, generator, progress=None):
        """As it was built."""

    def param_groups(self):
        return [{"name": "all", "params": list(self.parameters()), "lr": 0.1}]

    @classmethod
    def planned_storage(cls, spec, geometry, ipc):
        return {"palette": spec.colours, "pixels": geometry.budget(ipc) / 2}

    def decode(self, index):
        images = self.palette[self.index.long()[index]] * self.spec.gain
        return images, self.classes[index] if self.soft is None else self.soft[index]

    def storage(self):
        tensors = {"palette": self.palette.detach(), "pixels.index": self.index}
        return tensors | ({} if self.soft is None else {"labels": self.soft.detach()})

    @classmethod
    def from_storage(cls, spec, geometry, ipc, labels, tensors):
        made = cls(spec, geometry, ipc, labels)
        for name, tensor in made.storage().items():
            if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (tensor.dtype, tensor.shape):
                raise ArtifactError(f"tensor {name!r} is missing or not {list(tensor.shape)}")
        if int(tensors["pixels.index"].to(torch.int32).max()) >= spec.colours:
            raise ArtifactError("an index is out of range")
        made.palette, made.index = nn.Parameter(tensors["palette"]), tensors["pixels.index"]
        made.soft = nn.Parameter(tensors["labels"]) if spec.soft else None
        return made


PLUGIN = Tiny
