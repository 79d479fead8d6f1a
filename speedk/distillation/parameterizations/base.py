"""What is learned: the interface between a synthetic set and the loop, the objectives and the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from speedk.errors import ArtifactError
from speedk.geometry import Geometry
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.data import RealData


@dataclass(frozen=True)
class ParameterizationSpec:
    """Recipe fields of a method: those that a subclass adds, of JSON types alone."""

    def check(self, geometry: Geometry) -> None:
        """Raise ConfigError where the fields do not go together, or not with images of `geometry`: before anything is
        made of a recipe, and of the header of a file."""


class Parameterization(nn.Module):
    """A synthetic set of N images as a differentiable function of learned tensors.

    A method is one file in this folder: a subclass, a frozen dataclass `Spec` of its recipe fields that extends
    `ParameterizationSpec` (whose `Spec.check` refuses values that cannot be), and `PLUGIN = <the class>` at the end.
    `N` counts decoded images, not stored ones: a method that decodes several images from one stored tensor (IDC), or
    every pair of a basis and a hallucinator (HaBa), numbers its decoded images 0 to N - 1. Learned labels are a
    parameter that `decode` returns and `storage` names "labels". An objective with its own path from synthetic data to
    gradients (a backward through training, a kernel regression) needs nothing more than `decode`; HaBa's second
    network, which learns against the first from the features of a student, would need more than there is here.
    """

    REQUIRED: ClassVar = ("name", "Spec", "initialise", "decode", "param_groups", "storage", "from_storage",
                          "planned_storage")
    """What every method has of its own; for the rest there is a default."""

    Spec: ClassVar[type[ParameterizationSpec]] = ParameterizationSpec
    name: ClassVar[str]
    """The file's."""

    OUTER: ClassVar[dict[str, Any]] = {}
    """Fields of `ObjectiveSpec` that suit the method, where neither a recipe nor the objective says them."""

    classes: Tensor
    """int64 [N], a buffer: the class that each decoded image stands for, class by class (0 0 0 1 1 1 ...)."""

    def __init__(self, spec: Any, geometry: Geometry, ipc: int) -> None:
        super().__init__()
        self.spec, self.geometry, self.ipc = spec, geometry, ipc

    def initialise(self, real: RealData, generator: torch.Generator, progress=None) -> None:
        """Set the starting values; everything random comes from `generator` (on the CPU)."""
        raise NotImplementedError

    def decode(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W], normalised, and labels (int64 [B] or float [B, classes]) of int64 `index` [B]."""
        raise NotImplementedError

    def accumulate(self, index: Tensor, d_images: Tensor, d_labels: Tensor | None = None,
                   pool: Pool | None = None) -> None:
        """Add to the gradients of the learned tensors those of sum(images * d_images) (+ sum(labels * d_labels)).

        An objective decodes without a graph, differentiates its loss down to the images, and hands the result here; so
        no graph of the decoder outlives a piece of the batch. `pool`, if entered, may do the pieces.
        """
        with torch.enable_grad():
            images, labels = self.decode(index)
        outputs, gradients = [images], [d_images]
        if d_labels is not None and labels.requires_grad:
            outputs, gradients = [images, labels], [d_images, d_labels]
        torch.autograd.backward(outputs, gradients)

    def penalty(self) -> Tensor | None:
        """A term of the outer loss over the whole set (SPEED: lambda times the sum of |A|), or None."""
        return None

    def accumulate_penalty(self) -> float | None:
        """Add to the gradients of the learned tensors those of `penalty`, and return its value."""
        with torch.enable_grad():
            penalty = self.penalty()
        if penalty is None:
            return None
        penalty.backward()
        return float(penalty.detach())

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for torch.optim: each with "name", "params", "lr", and whatever else that optimiser takes."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Become what is stored: from here on `decode` gives exactly what a reader of the file gets."""

    def storage(self) -> dict[str, Tensor]:
        """The tensors that are counted and saved, contiguous, on the CPU; valid after `finalize`."""
        raise NotImplementedError

    def density(self, index: Tensor) -> Tensor | None:
        """How many stored numbers, not zero, each patch of the images `index` has for itself: int64 [B, rows, columns],
        valid after `finalize`; None where images have no patches."""
        return None

    def whole(self) -> Parameterization | None:
        """An empty set that takes the `state_dict` of the one that was trained to this one, and decodes it with nothing
        left out; None where all that is learned is stored."""
        return None

    def left_out(self, whole: Parameterization) -> list[str]:
        """How much of `whole` this set holds, in a line for the user, and what else is to be said of it."""
        kept = sum(tensor.numel() for tensor in self.storage().values() if tensor.is_floating_point())
        return [f"kept: {kept:,} of {sum(p.numel() for p in whole.parameters()):,} learned numbers"]

    @classmethod
    def from_storage(cls, spec: Any, geometry: Geometry, ipc: int, labels: list[int],
                     tensors: Mapping[str, Tensor]) -> Parameterization:
        """Rebuild from `storage`; `labels` counts the images of each class. Raises ArtifactError where shapes,
        dtypes, names or indices are not what `spec` says."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, geometry: Geometry, ipc: int) -> dict[str, Any]:
        """Fields of `Spec` for a storage of `ipc` images per class that no recipe is shipped for, where the defaults do
        not fit it."""
        return {}

    @classmethod
    def planned_storage(cls, spec: Any, geometry: Geometry, ipc: int) -> dict[str, float]:
        """Parts and their float32-equivalents that a recipe will store (Eq. 7), without building anything."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """N, the number of decoded images."""
        return self.classes.numel()


def class_labels(counts: list[int]) -> Tensor:
    """int64 [N]: counts[0] zeros, counts[1] ones, ..."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))


def expect_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raise ArtifactError unless `tensors` are exactly the `expected` names, shapes and dtypes, all values finite."""
    if unknown := sorted(set(tensors) ^ set(expected)):
        state = "is missing" if unknown[0] in expected else "does not belong here"
        raise ArtifactError(f"tensor {unknown[0]!r} {state}")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                                f"expected {dtype} {list(shape)}")
        if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name!r} holds a value that is not finite")


@torch.no_grad()
def detached(synthetic: Parameterization, index: Tensor) -> tuple[Tensor, Tensor]:
    """`synthetic.decode(index)` without a graph, in whatever thread."""
    return synthetic.decode(index)
