"""What a way of choosing real images is: the interface between a method and the data it chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Members:
    """The training images of one class, as a network that was trained on the whole data set sees them.

    features: float32 [size, F], what its classifier reads; forgotten: int64 [size], how often each image was forgotten
    during its training. Both are None for a method that does not look at them.
    """

    size: int
    features: Tensor | None = None
    forgotten: Tensor | None = None


class Coreset:
    """A method is one file in this folder: a subclass, and `PLUGIN = <the class>` at the end."""

    REQUIRED: ClassVar = ("name", "says", "choose")
    """What every method has of its own."""

    name: ClassVar[str]
    """The file's."""
    looks_at: ClassVar[str] = ""
    """What a network is trained on the whole data set for: "features", "forgotten", or "" for nothing."""
    says: ClassVar[str]
    """How the images are chosen, in words for a report: "real images ..."."""

    @staticmethod
    def choose(members: Members, count: int, generator: torch.Generator) -> Tensor:
        """int64 [count]: places among `members`, none twice, in the order of choice. `count` is at most their size;
        everything random comes from `generator` (on the CPU)."""
        raise NotImplementedError
