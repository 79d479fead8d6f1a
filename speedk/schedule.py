"""How a network is trained and tested: the protocols that make two accuracies comparable."""

from __future__ import annotations

from dataclasses import dataclass, replace

from speedk.errors import ConfigError
from speedk.precision import PRECISIONS
from speedk.registry import nearest


@dataclass(frozen=True)
class Schedule:
    """One training: `epochs` of SGD with momentum; after half of them and one more, the rate falls to a tenth and the
    optimiser starts afresh (its momentum is zero).

    standardise: every batch, in training and in testing, is shifted and scaled by its own mean and standard deviation
    (one number each, over all its images), before it is augmented. The accuracy on an image then depends on the batch
    it is tested in. precision: what convolutions and matrix products are rounded to, in training and in testing.
    """

    epochs: int
    rate: float = 0.01
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    standardise: bool = False
    precision: str = "float32"

    @property
    def drop(self) -> int:
        """The number of epochs at the full rate."""
        return self.epochs // 2 + 1

    def __str__(self) -> str:
        parts = [f"{self.epochs:,} epochs, batch {self.batch}, SGD at {self.rate:g}"]
        if self.drop < self.epochs:
            parts.append(f"x 0.1 with a fresh optimiser after epoch {self.drop:,}")
        parts.append(f"momentum {self.momentum:g}, weight decay {self.weight_decay:g}")
        parts.append("DSA" if self.augment else "no augmentation")
        if self.precision != "float32":
            parts.append(f"products in {self.precision}")
        return ", ".join(parts)


PROTOCOLS = {"paper": Schedule(epochs=1001), "quick": Schedule(epochs=200)}
WHOLE = Schedule(epochs=50)
STANDARDISATIONS = ("mtt", "speed")


def schedule(protocol: str, standardisation: str = "mtt", whole: bool = False, rate: float | None = None,
             epochs: int | None = None, precision: str = "float32") -> Schedule:
    """The schedule of a named protocol, one of PROTOCOLS; the whole data set has its own, WHOLE, under every name.

    standardisation: "speed" standardises every batch by its own statistics, "mtt" does not. rate, epochs: in place of
    the schedule's own. precision: "float32", or "bf16", which is faster and no longer the published protocol. Raises
    ConfigError for another name or a number that cannot be.
    """
    for what, value, known in (("protocol", protocol, [*PROTOCOLS]),
                               ("standardisation", standardisation, [*STANDARDISATIONS]),
                               ("precision", precision, [*PRECISIONS])):
        if value not in known:
            raise ConfigError(f"{what} {value!r} is not one of {', '.join(known)}{nearest(value, known)}")
    chosen = replace(WHOLE if whole else PROTOCOLS[protocol], standardise=standardisation == "speed",
                     precision=precision)
    if rate is not None:
        if not 0 < rate < float("inf"):
            raise ConfigError(f"a rate of {rate} cannot train: it must be above 0 and finite")
        chosen = replace(chosen, rate=rate)
    if epochs is not None:
        if epochs < 1:
            raise ConfigError(f"epochs={epochs} must be at least 1")
        chosen = replace(chosen, epochs=epochs)
    return chosen
