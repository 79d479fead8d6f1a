"""A run directory: what a run leaves behind, and who may write to it."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import torch

from speedk import pictures
from speedk.data import RealData
from speedk.distillation import recipe as recipes
from speedk.distillation import runfiles
from speedk.distillation.parameterizations.base import Parameterization
from speedk.distillation.recipe import Recipe
from speedk.errors import ConfigError
from speedk.files import locked, sweep, unwritable, write_atomic

OURS = (runfiles.RECIPE, runfiles.DISTILLED, runfiles.LOG, runfiles.PREVIEW, runfiles.DATA, runfiles.CHECKPOINTS,
        runfiles.EVENTS)
PREVIEW_COLUMNS = 10
PREVIEW_CLASSES = 20


class RunDir:
    """The directory of one run, locked while it is entered.

    Holds recipe.toml (resolved), data.json (what was distilled), log.jsonl, preview.png, tensorboard/, checkpoints/ and
    distilled.safetensors. Raises ConfigError where it holds a run and `resume` is not asked for, holds a run of another
    recipe or other data, or another process is at work in it.

    chosen: why this objective, of a run that begins; once entered, what the run was begun with.
    """

    def __init__(self, path: str | Path, recipe: Recipe, real: RealData, resume: bool, chosen: str = "") -> None:
        self.path, self.recipe, self.real, self.resume, self.chosen = Path(path), recipe, real, resume, chosen
        self.checkpoints = self.path / runfiles.CHECKPOINTS
        self.artifact = self.path / runfiles.DISTILLED

    def __enter__(self) -> RunDir:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None
        with contextlib.ExitStack() as held:
            if not held.enter_context(locked(self.path / ".lock", wait=False)):
                raise ConfigError(f"another process is distilling into {self.path}; wait for it, or choose another "
                                  "--out")
            self._claim()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _claim(self) -> None:
        for folder in (self.path, self.checkpoints):
            sweep(folder)
        if holds_a_run(self.path) and not self.resume:
            raise ConfigError(f"{self.path} already holds a run; say --resume to go on with it, or choose another "
                              "--out")
        self.chosen = begun_with(self.path) or self.chosen
        data = {"fingerprint": self.real.fingerprint, "split": self.real.split, "threads": torch.get_num_threads(),
                "chosen": self.chosen}
        for name, check in ((runfiles.RECIPE, self._same_recipe), (runfiles.DATA, lambda: self._same_data(data))):
            if (self.path / name).exists():
                check()
            elif any(self.checkpoints.glob("step-*")):  # it was written before the first of them
                raise ConfigError(f"{self.path} holds checkpoints but no {name}, so what they are of is not known; "
                                  "choose another --out")
        write_atomic(self.path / runfiles.DATA, json.dumps(data, indent=1).encode() + b"\n")
        write_atomic(self.path / runfiles.RECIPE, recipes.to_toml(self.recipe.to_dict()).encode())

    def _same_data(self, now: dict[str, object]) -> None:
        path = self.path / runfiles.DATA
        try:
            stored = json.loads(path.read_bytes())
            fingerprint, split = str(stored["fingerprint"]), stored["split"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(f"{path} is damaged: it does not say what the run was begun on; choose another "
                              "--out") from None
        if (fingerprint, split) != (now["fingerprint"], now["split"]):
            raise ConfigError(f"{self.path} was begun on other data (fingerprint {fingerprint[:12]}, split {split}; "
                              f"now {str(now['fingerprint'])[:12]}, {now['split']})")

    def _same_recipe(self) -> None:
        stored = _flat(recipes.read(self.path / runfiles.RECIPE))
        wanted = _flat(self.recipe.to_dict())
        local = [f"objective.{name}" for name in self.recipe.objective.LOCAL]
        # These may change: the steps already made are the same. Where rates fall towards the last step, they are not.
        steps = ["objective.steps"] if self.recipe.objective.schedule == "constant" else []
        for name in (*steps, "run.preview_every", *local):
            stored.pop(name, None), wanted.pop(name, None)
        changed = [name for name in sorted(set(stored) | set(wanted)) if stored.get(name) != wanted.get(name)]
        if changed:
            name = changed[0]
            raise ConfigError(f"{self.path} holds a run with {name}={stored.get(name)!r}, not {wanted.get(name)!r}; "
                              "leave that out, or choose another --out")

    def log(self, done: int) -> Log:
        return Log(self.path, done)

    def last_good(self, step: int) -> str:
        """What to do after a divergence, where `step` is the last checkpoint from before it."""
        said = f"start anew in another --out; the last good checkpoint is of step {step:,}, in {self.checkpoints}"
        if step and self.recipe.objective.schedule == "constant":
            said += f", and --resume --steps {step} makes a file of it"
        return said

    @torch.no_grad()
    def preview(self, synthetic: Parameterization, real: RealData) -> None:
        """preview.png: a row per class of up to ten decoded images, for at most twenty classes."""
        classes = range(min(PREVIEW_CLASSES, real.geometry.classes))
        rows = [(synthetic.classes == label).nonzero()[:PREVIEW_COLUMNS, 0] for label in classes]
        images = [real.normaliser.unit(synthetic.decode(index)[0]).cpu() for index in rows]
        write_atomic(self.path / runfiles.PREVIEW, pictures.grid(images, list(real.class_names)))


def holds_a_run(path: Path) -> bool:
    """Whether there is anything of a run in the folder `path`."""
    checkpoints = path / runfiles.CHECKPOINTS
    return any((path / name).exists() for name in OURS if name != checkpoints.name) or (
        checkpoints.is_dir() and any(checkpoints.iterdir()))


def begun_with(path: Path) -> str:
    """Why the run in `path` has its objective, as it was said when it began; "" where that is not known."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads((path / runfiles.DATA).read_bytes())["chosen"])
    return ""


class Log(contextlib.AbstractContextManager):
    """log.jsonl and TensorBoard events, cut back to `done` steps where a stopped run had got further than its
    checkpoint."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / runfiles.LOG
        kept = [line for line in _lines(path) if _step(line) <= done] if path.exists() else []
        write_atomic(path, "".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._events = SummaryWriter(str(folder / runfiles.EVENTS), purge_step=done + 1 if done else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise unwritable(self._file.name, error) from None
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise unwritable(self._file.name, error) from None
        self._events.flush()

    def __exit__(self, *_) -> None:
        self._events.close()
        try:
            self._file.close()
        except OSError as error:
            raise unwritable(self._file.name, error) from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise unwritable(path, error) from None


def _step(line: str) -> float:
    """Of a line of the log; infinite for what a kill or a power cut left of one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if line.endswith("\n") and type(step) is int else math.inf


def _flat(tables: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tables.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


