"""What the ops are asked to reach, and whether the rows of a report do."""

from __future__ import annotations

from dataclasses import dataclass

FAST = ("tf32", "bf16")


@dataclass(frozen=True)
class Floor:
    """`ours` in a contest against `other`, by `kind`:
    "faster": other's time over ours, at least; "slower": our time over other's, at most; "memory": our peak over
    other's, at most; "roof": part of the measured roof, at least; "rate": items a second, at least."""

    device: str
    op: str
    case: str
    kind: str
    asked: float
    other: str = ""
    ours: str = "speedk"
    precision: str = "float32"

    def measured(self, rows: list[dict]) -> float | None:
        found = {row["who"]: row for row in rows
                 if (row["op"], row["case"], row["precision"]) == (self.op, self.case, self.precision)
                 and not row.get("absent")}  # fmt: skip
        ours, other = found.get(self.ours), found.get(self.other)
        if ours is None or (self.other and other is None):
            return None
        if self.kind == "roof":
            return ours["of_roof"]
        if self.kind == "rate":
            return ours["items_per_second"]
        if self.kind == "memory":
            return ours["peak_bytes"] / other["peak_bytes"] if ours["peak_bytes"] and other["peak_bytes"] else None
        ratio = other["milliseconds"] / ours["milliseconds"]
        return ratio if self.kind == "faster" else 1 / ratio

    def met(self, value: float) -> bool:
        return value <= self.asked if self.kind in ("slower", "memory") else value >= self.asked

    def says(self, value: float) -> str:
        if self.kind == "roof":
            return f"{100 * value:.0f}% of the roof"
        if self.kind == "rate":
            return f"{value / 1e6:.1f} million a second"
        unit = {"faster": "times as fast as", "slower": "of the time of", "memory": "of the memory of"}[self.kind]
        return f"{value:.2f} {unit} {self.other}"


def _training(case: str, eager: float, compiled: float) -> list[Floor]:
    found = []
    for precision in FAST:
        rest = {"precision": precision}
        found += [Floor("cuda", "freenet fwd+bwd", case, "faster", eager, "eager", **rest),
                  Floor("cuda", "freenet fwd+bwd", case, "memory", 0.5, "eager", **rest),
                  Floor("cuda", "freenet fwd+bwd", case, "faster", compiled, "torch.compile", **rest)]  # fmt: skip
    return found


def _unroll(case: str, full: float, constant: float) -> list[Floor]:
    return [Floor("cuda", "unroll", case, "faster", asked, "eager", who, "tf32")
            for who, asked in (("full", full), ("constant", constant))]  # fmt: skip


FLOORS = [
    *(Floor("cpu", "sparsify", case, "slower", 1.5, "copy") for case in ("cifar10-ipc10", "imagenet-ipc1")),
    *(Floor("cpu", "topk_mask", case, "faster", 4, "topk + scatter") for case in ("cifar10-ipc10", "imagenet-ipc1")),
    *(Floor("cpu", "coo_encode", case, "faster", 4, "topk + sort + gather")
      for case in ("cifar10-ipc10", "imagenet-ipc1")),
    *(Floor("cpu", "coo_decode", case, "faster", 0.6, "fill") for case in ("cifar10-ipc10", "imagenet-ipc1")),
    *(Floor("cpu", "mhsc_coo", case, "faster", 4, "scatter_add + matmul")
      for case in ("cifar10-ipc10", "imagenet-ipc1")),
    *(Floor("cpu", "freenet_coo", case, kind, asked, "dense, eager") for case in ("cifar10-ipc10", "imagenet-ipc1")
      for kind, asked in (("faster", 1.5), ("memory", 1 / 3))),
    *(Floor("cpu", "freenet fwd+bwd", case, kind, asked, "eager")
      for case in ("cifar10-ipc1", "cifar10-ipc10", "cifar10-ipc50-batch", "imagenet-ipc1")
      for kind, asked in (("faster", 2), ("memory", 0.5))),
    Floor("cpu", "unroll", "cifar10-ipc1 T=5", "slower", 0.75, "eager", "full"),
    Floor("cpu", "unroll", "cifar10-ipc1 T=5", "slower", 1.0, "eager", "constant"),
    *(Floor("cpu", op, "P=320010", "faster", 1.0, "eager") for op in ("unroll_step", "unroll_step_adjoint")),
    *_training("cifar10-ipc1", 2.5, 1.2), *_training("cifar10-ipc10", 2.5, 1.2),
    *_training("cifar10-ipc50-batch", 1.3, 1.0), *_training("imagenet-ipc1", 1.3, 1.0),
    *(Floor("cuda", op, case, "roof", 0.7) for op in ("coo_decode", "unpatchify")
      for case in ("cifar10-ipc10", "imagenet-ipc1")),
    Floor("cuda", "sparsify", "cifar10-ipc10", "roof", 0.7), Floor("cuda", "sparsify", "imagenet-ipc1", "roof", 0.5),
    *(Floor("cuda", "freenet_coo", f"cifar10 D={D} N=131072", "rate", asked, precision=precision)
      for D, precision, asked in ((32, "float32", 20e6), (32, "tf32", 20e6), (32, "bf16", 20e6), (96, "float32", 4e6),
                                  (96, "tf32", 12e6), (96, "bf16", 12e6), (192, "bf16", 2e6))),
    *_unroll("cifar10-ipc1 T=20", 3, 2), *_unroll("cifar10-batch256 T=20", 1.8, 1.3),
    *_unroll("imagenet-ipc1 T=20", 1.8, 1.3),
    # A twentieth at 60 steps, and with fewer as much more: eager's memory is in proportion to the steps.
    *(Floor("cpu", "unroll", f"{shape} T={steps}", "memory", 3 / steps, "eager", "constant")
      for shape, steps in (("cifar10-ipc1", 5), ("cifar10-ipc1", 10), ("cifar10-ipc10", 10), ("imagenet-ipc1", 5))),
    *(Floor("cuda", "unroll", f"{shape} T={steps}", "memory", 3 / steps, "eager", "constant", "tf32")
      for shape, steps in (("cifar10-ipc1", 60), ("cifar10-ipc10", 60), ("cifar10-batch256", 20), ("imagenet-ipc1", 10),
                           ("imagenet-ipc1", 20))),
]  # fmt: skip


def verdicts(rows: list[dict], device: str) -> list[dict]:
    """For each floor of `device`: what was asked, what was measured, and whether it was met (None: not measured)."""
    found = []
    for floor in FLOORS:
        if floor.device != device:
            continue
        value = floor.measured(rows)
        found.append({
            "op": floor.op, "case": floor.case, "precision": floor.precision, "who": floor.ours, "kind": floor.kind,
            "against": floor.other or None, "asked": floor.asked, "measured": value,
            "met": None if value is None else floor.met(value), "asked_in_words": floor.says(floor.asked),
            "measured_in_words": "not measured" if value is None else floor.says(value),
        })  # fmt: skip
    return found
