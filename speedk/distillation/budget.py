"""The storage budget of a distilled set: Eq. 7 of the paper, counted in float32 numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.text import table


def index_floats(size: int) -> float:
    """float32-equivalents of the two coordinates of one entry: two uint8 up to 256, two uint16 beyond."""
    return 0.5 if size <= 256 else 1.0


def speed_storage(N: int, D: int, K: int, H: int, R: int, k: int, J: int, L: int) -> dict[str, float]:
    """The left side of Eq. 7 by its parts: D K + 1.5 N H k + R (3 D^2 + 7 D) + L (D + 1).

    The factor 1.5 holds while J and K are at most 256; beyond that the coordinates are uint16 and it is 2.
    """
    return {
        "saet": D * K,
        "scm values": N * H * k,
        "scm coordinates": N * H * k * index_floats(max(J, K)),
        "freenet blocks": R * (3 * D * D + 7 * D),
        "freenet output": L * (D + 1),
    }


@dataclass(frozen=True)
class Budget:
    """What a recipe stores, by part, against what its images per class allow (both in float32 numbers)."""

    parts: Mapping[str, float]
    allowed: int

    @property
    def counted(self) -> float:
        return sum(self.parts.values())

    def table(self) -> str:
        """The split of the budget, a line a part."""
        amounts = [*self.parts.items(), ("counted", self.counted), ("budget", self.allowed)]
        rows = [(name, f"{value:,.0f}", f"{value / self.allowed:.1%}") for name, value in amounts]
        return textwrap.indent(table(rows, numbers=(1, 2)), "  ")

    def check(self) -> None:
        """Raise ConfigError, with the sum, where more is counted than allowed."""
        if self.counted > self.allowed:
            total = " + ".join(f"{value:,.0f} {name}" for name, value in self.parts.items())
            raise ConfigError(f"over the budget: {total} = {self.counted:,.0f} float32 numbers, but {self.allowed:,} "
                              "are allowed; lower images_per_class, k, D or R, raise ipc, or say budget=off")


def patch_for(resolution: int) -> int:
    """The paper's patch: 64 patches up to 64 pixels and 256 beyond, or the nearest that divides the resolution."""
    wanted = 8 if resolution <= 64 else 16
    sides = [side for side in range(1, resolution + 1) if resolution % side == 0 and side * side <= 256]
    side = min(sides, key=lambda s: (abs(math.log(s / wanted)), -s))
    return resolution // side


def solve(geometry: Geometry, ipc: int) -> dict[str, int]:
    """SPEED's sizes for a data set without a published recipe.

    Among the sizes that obey the paper's rules (appendix I and Section 3.3: D/H <= K so that each head is a complete
    dictionary, density k / JK < 5%, N/c > 10 where possible, Eq. 7) it takes those nearest to the pattern of the ten
    published rows: about a fifth of the budget in what all images share, heads of 32 dimensions (16 where the budget
    is tiny), 64, 128 or 256 tokens by resolution, about 15 ipc^0.8 images a class, codes of at least 2% density, and
    1, 2, 3 blocks for budgets of up to 50 thousand, 1.5 million and more. Raises ConfigError where nothing fits.
    """
    patch = patch_for(geometry.resolution)
    J = (geometry.resolution // patch) ** 2
    L = patch * patch * geometry.channels
    allowed = geometry.budget(ipc)
    top = 64 if geometry.resolution <= 32 else 128 if geometry.resolution <= 64 else 256
    wanted_images = 15 * ipc**0.8
    wanted_blocks = 1 if allowed < 50_000 else 2 if allowed < 1_500_000 else 3
    best: tuple[float, dict[str, int]] | None = None
    for D in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
        for H in (1, 2, 3, 4, 6, 8):
            for K in (16, 32, 64, 128, 256):
                if D % H or D // H > K or top < K:
                    continue
                for R in (1, 2, 3):
                    for k in (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
                        parts = speed_storage(1, D, K, H, R, k, J, L)
                        one = parts["scm values"] + parts["scm coordinates"]
                        fixed, each = sum(parts.values()) - one, one * geometry.classes
                        images = int((allowed - fixed) // each)
                        density = k / (J * K)
                        if images < 1 or density >= 0.05:
                            continue
                        cost = (
                            math.log(fixed / allowed / 0.2) ** 2
                            + 4 * math.log(images / wanted_images) ** 2
                            + math.log(D / H / (16 if allowed < 50_000 else 32)) ** 2
                            + math.log(K / top) ** 2 / 4
                            + max(0.0, math.log(0.02 / density)) ** 2
                            + (R - wanted_blocks) ** 2 / 4
                            + (100 if images <= 10 else 0)
                        )
                        if best is None or cost < best[0]:
                            best = cost, dict(images_per_class=images, D=D, K=K, H=H, R=R, k=k, patch=patch)
    if best is None:
        raise ConfigError(f"no SPEED fits {allowed:,} float32 numbers ({geometry.classes} classes, ipc={ipc}, "
                          f"{geometry.shape} pixels); raise ipc or the resolution")
    return best[1]
