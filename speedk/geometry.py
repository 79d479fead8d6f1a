"""The shape of a labelled image set, and the storage that a number of images per class buys."""

from __future__ import annotations

from dataclasses import dataclass

MAX_RESOLUTION = 4096
"""The largest side of an image, in pixels."""


@dataclass(frozen=True)
class Geometry:
    """What a parameterization must know of the data: `classes`, `channels` (1 or 3) and `resolution` (side, pixels)."""

    classes: int
    channels: int
    resolution: int

    @property
    def pixels(self) -> int:
        """Values of one image, C H W: the L J of Eq. 7."""
        return self.channels * self.resolution**2

    @property
    def shape(self) -> str:
        """Of one image, as in "3x32x32"."""
        return f"{self.channels}x{self.resolution}x{self.resolution}"

    def budget(self, ipc: int) -> int:
        """float32 numbers that `ipc` plain images per class hold: the c n L J of Eq. 7."""
        return self.classes * ipc * self.pixels
