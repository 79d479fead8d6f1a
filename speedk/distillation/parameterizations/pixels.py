"""Plain synthetic images: `ipc` of them per class, a number a pixel. The baseline of every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedk.distillation.parameterizations.base import (
    Parameterization,
    ParameterizationSpec,
    class_labels,
    expect_tensors,
)
from speedk.errors import ConfigError
from speedk.geometry import Geometry

INITS = ("real", "noise")


@dataclass(frozen=True)
class Spec(ParameterizationSpec):
    """Recipe fields. init: "real" (images drawn from the training set) or "noise" (standard normal)."""

    init: str = "real"

    def check(self, geometry: Geometry) -> None:
        if self.init not in INITS:
            raise ConfigError(f"init={self.init!r} is not one of {', '.join(INITS)}")


class Pixels(Parameterization):
    """Images learned as they are: N = classes * ipc."""

    Spec = Spec
    name = "pixels"

    def __init__(self, spec: Spec, geometry: Geometry, ipc: int, labels: list[int] | None = None,
                 images: Tensor | None = None) -> None:
        super().__init__(spec, geometry, ipc)
        counts = [ipc] * geometry.classes if labels is None else labels
        self.register_buffer("classes", class_labels(counts), persistent=False)
        if images is None:
            images = torch.zeros(self.size, geometry.channels, geometry.resolution, geometry.resolution)
        self.images = nn.Parameter(images)

    @torch.no_grad()
    def initialise(self, real, generator: torch.Generator, progress=None) -> None:
        if self.spec.init == "noise":
            self.images.copy_(torch.empty_like(self.images, device="cpu").normal_(generator=generator))
            return
        for label in range(self.geometry.classes):
            drawn = real.sample(label, self.ipc, generator)
            if len(drawn) < self.ipc:
                raise ConfigError(f"class {real.class_names[label]!r} has {len(drawn)} training images, fewer than ipc="
                                  f"{self.ipc}: lower ipc or say init=noise")
            self.images[label * self.ipc : (label + 1) * self.ipc] = drawn

    def decode(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index], self.classes[index]

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"name": "pixels", "params": [self.images], "lr": 1.0}]

    def storage(self) -> dict[str, Tensor]:
        return {"images": self.images.detach().cpu().contiguous()}

    @classmethod
    def from_storage(cls, spec: Spec, geometry: Geometry, ipc: int, labels: list[int],
                     tensors: Mapping[str, Tensor]) -> Pixels:
        side = geometry.resolution
        shape = (sum(labels), geometry.channels, side, side)
        expect_tensors(tensors, {"images": (shape, torch.float32)})
        return cls(spec, geometry, ipc, labels, tensors["images"]).requires_grad_(False)

    @classmethod
    def planned_storage(cls, spec: Spec, geometry: Geometry, ipc: int) -> dict[str, float]:
        return {"pixels": geometry.classes * ipc * geometry.pixels}


PLUGIN = Pixels
