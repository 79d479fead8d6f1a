"""Trajectory matching (Cazenavette et al., CVPR 2022): train on synthetic images, arrive where an expert arrived."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from speedk import memory, networks, seeds
from speedk.distillation import experts
from speedk.distillation.experts.folder import IDENTITY_FILE, ExpertFolder, Identity
from speedk.distillation.objectives.base import ABSURD, Diverged, Objective, ObjectiveSpec, Skip, too_high
from speedk.distillation.parameterizations.base import Parameterization, detached
from speedk.distillation.unroll import dsa_steps, unroll
from speedk.errors import ConfigError
from speedk.text import counted
from speedk.workers import Pool

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.loop import Progress

DIVERGED = 10.0
"""A loss above this is a student that ended ten times (in square) further from the expert than it began."""

FAILURES = 10
"""Iterations without a usable gradient, one after another, at which the run stops."""

GROWN, USUAL = 10.0, 256
"""Synthetic images so many times larger than real ones (of which so many are looked at) are what a student diverges
on, whatever its rate."""

INNER_STEP = 5.0
"""The time of an inner step in training steps on as many images, measured on a CPU: it is one, built twice and
differentiated once more."""

DECODE_BYTES = 16 << 20
"""Bytes of decoded images whose way back to the learned tensors is walked at a time."""


@dataclass(frozen=True)
class Spec(ObjectiveSpec):
    """Recipe fields. batch, inner_steps, inner_momentum: of the student's training on the synthetic images, in which
    m = inner_momentum m + (1 - inner_momentum) g. max_start: the start epoch is drawn from 0 to max_start - 1;
    expert_epochs: from there to the target. synthetic_lr: the learned rate's start; synthetic_lr_floor: its least
    value. augment: DSA, in the student's training and the experts'. experts: a folder of experts, not the cache's.
    expert_count, expert_rate, expert_batch, expert_seed: how many experts, and how they are trained where there are
    none; standardise: their batches by their own statistics, as the published code does; with protocol=speed they are
    unless this says false.
    """

    LOCAL: ClassVar[tuple[str, ...]] = ("experts",)

    batch: int = 256
    inner_steps: int = 60
    inner_momentum: float = 0.9
    max_start: int = 40
    expert_epochs: int = 2
    synthetic_lr: float = 0.01
    synthetic_lr_floor: float = 0.001
    augment: bool = True
    experts: str = ""
    expert_count: int = 100
    expert_rate: float = 0.01
    expert_batch: int = 256
    expert_seed: int = 0
    standardise: bool = False

    @property
    def epochs(self) -> int:
        """Epochs of an expert that can be read."""
        return self.max_start + self.expert_epochs - 1

    @classmethod
    def defaults(cls, protocol: str) -> dict[str, Any]:
        return {"standardise": True} if protocol == "speed" else {}

    def check(self) -> None:
        super().check()
        for name in ("batch", "inner_steps", "max_start", "expert_epochs", "expert_count", "expert_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.inner_momentum < 1:
            raise ConfigError(f"inner_momentum={self.inner_momentum} must be at least 0 and below 1")
        self.check_rates("synthetic_lr", "synthetic_lr_floor", "expert_rate")
        if self.synthetic_lr < self.synthetic_lr_floor:
            raise ConfigError(f"synthetic_lr={self.synthetic_lr} is below synthetic_lr_floor={self.synthetic_lr_floor}")


class TrajectoryMatching(Objective):
    """||theta_T - target||^2 / ||start - target||^2, where theta_T is the student after `inner_steps` steps on the
    synthetic images from an expert's parameters `start`, and `target` the expert's own `expert_epochs` later.

    The gradient goes through every step, exactly (`speedk.unroll`), to the images and to the student's learning rate,
    which is learned too.
    """

    Spec = Spec
    name = "tm"
    skips_where = "the student diverged"
    then_lower = "synthetic_lr"

    def __init__(self, spec: Spec, real, seed: int, device: torch.device) -> None:
        super().__init__(spec, real, seed, device)
        self._pool = Pool(device)
        self._student = networks.set_precision(networks.fresh(spec.network, real.geometry, 0, device), spec.network,
                                               spec.precision)
        self._rate = nn.Parameter(torch.tensor(spec.synthetic_lr, device=device))
        self._count = 0
        self._key = ""
        self._experts: ExpertFolder | None = None
        self._pretended: tuple[Tensor, Tensor] | None = None

    @classmethod
    def outer(cls, method: str, ipc: int) -> dict[str, Any]:
        """For pixels the defaults of the original's code."""
        return {"speed": {"schedule": "constant", "rates": {"synthetic_lr": 1e-4}},
                "pixels": {"rates": {"pixels": 1000.0, "synthetic_lr": 1e-5}}}.get(method, {})

    def preparation(self) -> tuple[str, float]:
        path, folder, count = self._find()
        need = experts.missing(folder, count, self.spec.epochs) if folder is not None else count * self.spec.epochs
        how = " on standardised batches" if self.spec.standardise else ""
        said = f"{counted(count, 'expert')} of {counted(self.spec.epochs, 'epoch')}{how} from {path}"
        if not need:
            return f"{said}: all are there", 0.0
        identity = folder.identity if folder is not None else expert_identity(self.spec, self.real)
        each = experts.epoch_seconds(identity, self.real, count, self.device)
        disk = 4e-6 * count * (self.spec.epochs + 1) * networks.parameter_count(self._student)
        todo = f"{need:,} of {counted(count * self.spec.epochs, 'epoch')} {'is' if need == 1 else 'are'} to be trained"
        return f"{said}: {todo}, {disk:,.1f} MB of disk in all", need * each

    def prepare(self, progress: Progress | None = None) -> None:
        if self._experts is not None or self._pretended is not None:
            return
        path, folder, count = self._find()
        if folder is None:
            folder = ExpertFolder.create(path, expert_identity(self.spec, self.real))
        if self._key and folder.identity.key != self._key:
            raise ConfigError(f"the run was begun with other experts than those in {path}: give their folder "
                              "(experts=DIR)")
        count = self._count or count
        experts.train(folder, self.real, count, self.spec.epochs, self.device,
                      progress=progress.experts if progress is not None else lambda *_: None)
        self._experts, self._count, self._key = folder, count, folder.identity.key

    def pretend(self) -> None:
        # A target so far away that a few steps are nothing to it: the loss is about 1, and no iteration is skipped.
        theta = nn.utils.parameters_to_vector(self._student.parameters()).detach()
        self._pretended = theta, theta + 1.0

    def step(self, synthetic: Parameterization, step: int) -> dict[str, float]:
        self.prepare()
        spec, generator = self.spec, seeds.generator(self.seed, "tm", step)
        start, target = self._pretended or self._drawn(generator)
        schedule = batches(synthetic.size, spec.batch, spec.inner_steps, generator)
        index, places = torch.unique(torch.cat(schedule), return_inverse=True)
        schedule = places.split([len(part) for part in schedule])
        images, labels = self._decode(synthetic, index.to(self.device))
        largest = float(images.detach().abs().amax())
        if not largest <= ABSURD:  # or nan
            raise too_high(f"there is a value of {largest:.3g} in the synthetic images at step {step + 1:,}",
                           synthetic, spec)
        if not bool(self._rate.isfinite()):
            raise Diverged(f"the synthetic rate is {float(self._rate.detach()):.3g} at step {step + 1}: lower "
                           "rates.synthetic_lr")
        loss, d_images, d_labels, d_rate = self._match(start, target, images, labels, schedule, step)
        if not loss < DIVERGED or not all(bool(d.isfinite().all()) for d in (d_images, d_labels, d_rate)
                                          if d is not None):
            self.failures += 1
            self.skipped += 1
            if self.failures >= FAILURES:
                raise self._lost(loss, largest, step, synthetic)
            raise Skip(self._rein_in())
        self.failures = 0
        with self._pool as pool:
            rows = max(1, DECODE_BYTES // (images.element_size() * images[0].numel()))
            of_labels = [None] * len(index) if d_labels is None else d_labels.split(rows)
            for part, *gradients in zip(index.split(rows), d_images.split(rows), of_labels):
                synthetic.accumulate(part.to(self.device), *gradients, pool=pool)
        self._rate.grad = d_rate if self._rate.grad is None else self._rate.grad + d_rate
        numbers = {"loss": loss, "synthetic_lr": float(self._rate.detach())}
        return numbers | ({"skipped": float(self.skipped)} if self.skipped else {})

    def learned(self) -> list[dict[str, Any]]:
        return [{"name": "synthetic_lr", "params": [self._rate], "lr": 1e-5}]

    @torch.no_grad()
    def after_update(self) -> None:
        self._rate.clamp_(min=self.spec.synthetic_lr_floor)

    def state_dict(self) -> dict[str, Any]:
        return {"synthetic_lr": self._rate.detach(), "failures": self.failures, "skipped": self.skipped,
                "experts": self._key, "count": self._count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rate.copy_(state["synthetic_lr"])
        self.failures, self.skipped = state["failures"], state["skipped"]
        self._key, self._count = state["experts"], state["count"]

    def artifact_fields(self) -> dict[str, float | str]:
        return {"lr": float(self._rate.detach()), "experts": self._key}

    def _find(self) -> tuple[Path, ExpertFolder | None, int]:
        """Where the experts are or will be, their folder if there is one, and how many are to be used."""
        identity = expert_identity(self.spec, self.real)
        path = Path(self.spec.experts) if self.spec.experts else experts.place(identity)
        if not (path / IDENTITY_FILE).exists():
            if self.spec.experts:
                raise ConfigError(f"there are no experts in {path}: make them (speedk experts --out {path}), or leave "
                                  "experts= out")
            return path, None, self.spec.expert_count
        folder = ExpertFolder.open(path)
        if wrong := folder.identity.difference(identity, ("network",)):
            raise ConfigError(f"{path} holds experts with {wrong}: say network={folder.identity.network}, or choose "
                              "another folder")
        experts.check_data(folder, self.real)
        there = len(folder.numbers())
        return path, folder, min(self.spec.expert_count, there) if self.spec.experts and there else (
            self.spec.expert_count)

    def _drawn(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The parameters of a random expert at a random start, and `expert_epochs` later."""
        number = int(torch.randint(self._count, (), generator=generator))
        epoch = int(torch.randint(self.spec.max_start, (), generator=generator))
        return (self._experts.snapshot(number, epoch).to(self.device),
                self._experts.snapshot(number, epoch + self.spec.expert_epochs).to(self.device))

    @torch.no_grad()
    def _decode(self, synthetic: Parameterization, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images and labels of `index` as leaves, decoded in pieces, without a graph."""
        with self._pool as pool:
            parts = index.split(pool.images(self.real.geometry.resolution))
            pieces = pool.map(detached, [(synthetic, part) for part in parts])
        images, labels = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return images.requires_grad_(), labels.requires_grad_(labels.is_floating_point())

    def _match(self, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, schedule: tuple[Tensor, ...],
               step: int) -> tuple[float, Tensor, Tensor | None, Tensor]:
        """The loss, and its gradients in the images, the labels (if they are learned) and the rate."""
        spec, rate = self.spec, self._rate.detach().requires_grad_()
        augment = dsa_steps(seeds.derive(self.seed, "tm dsa", step)) if spec.augment else None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(seeds.derive(self.seed, "tm dropout", step))
            reached = unroll(self._student, start, images, labels, schedule, rate, spec.inner_momentum, augment,
                             memory=_spare(self.device))
            loss = (reached - target).square().sum() / (start - target).square().sum()
            leaves = [images, rate] + ([labels] if labels.requires_grad else [])
            d_images, d_rate, *d_labels = torch.autograd.grad(loss, leaves)
        return float(loss.detach()), d_images, d_labels[0] if d_labels else None, d_rate

    @torch.no_grad()
    def _rein_in(self) -> dict[str, float]:
        """Lower the rate, which is what makes a student diverge as a rule; the numbers to log."""
        self._rate.mul_(0.5).clamp_(min=self.spec.synthetic_lr_floor)
        return {"skipped": float(self.skipped), "synthetic_lr": float(self._rate.detach())}

    def _lost(self, loss: float, largest: float, step: int, synthetic: Parameterization) -> Diverged:
        """Why the student diverged again and again, on images whose values reach `largest`."""
        spec, rate = self.spec, float(self._rate.detach())
        what = (f"the student diverged in {FAILURES} iterations one after another, to step {step + 1}, at last with a "
                f"loss of {loss:.3g} at a rate of {rate:.3g}")
        some = torch.arange(min(USUAL, len(self.real.train)), device=self.device)
        usual = float(self.real.normalised("train", some).abs().amax())
        if largest > GROWN * usual:
            return too_high(f"{what}, on synthetic images that reach {largest:.3g} where real ones reach {usual:.3g}",
                            synthetic, spec)
        if rate <= spec.synthetic_lr_floor * (1 + 1e-6):
            return Diverged(f"{what}, the least that synthetic_lr_floor allows: lower synthetic_lr_floor, or "
                            "inner_steps")
        return Diverged(f"{what}: lower synthetic_lr and rates.synthetic_lr, or inner_steps")


def seconds(spec: Spec, real: RealData, device: torch.device) -> tuple[float, float]:
    """About how long one iteration takes, and all with the experts, by a training step of the student that is measured
    for a moment: runs that go another way say it, too, and should not wait for it."""
    image = experts.image_seconds(spec.network, real.geometry, device)
    iteration = spec.inner_steps * spec.batch * image * INNER_STEP
    return iteration, spec.steps * iteration + spec.expert_count * spec.epochs * len(real.train) * image


def expert_identity(spec: Spec, real: RealData, precision: str = "float32") -> Identity:
    """The experts that `spec` asks for."""
    return Identity.of(real, network=spec.network, rate=spec.expert_rate, batch=spec.expert_batch,
                       augment=spec.augment, standardise=spec.standardise, seed=spec.expert_seed, precision=precision)


def batches(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """`steps` index tensors: pieces of at most `batch` of a permutation of all `count` images, drawn anew when it is
    used up."""
    schedule: list[Tensor] = []
    while len(schedule) < steps:
        schedule += torch.randperm(count, generator=generator).split(batch)
    return schedule[:steps]


def _spare(device: torch.device) -> int:
    """Bytes that step graphs may take: half of what is free on a GPU, a quarter elsewhere, where others want some too.
    How much that is does not change the numbers."""
    return memory.spare(device) // (2 if device.type == "cuda" else 4)


PLUGIN = TrajectoryMatching
