"""speedk coreset: real images chosen instead of synthetic ones learned, as a file of the same kind."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli import _options, _testing
from speedk.distillation import runfiles
from speedk.errors import ConfigError
from speedk.files import unwritable, write_atomic
from speedk.registry import described
from speedk.schedule import WHOLE
from speedk.text import table

if TYPE_CHECKING:
    from torch import Tensor

    from speedk.data import RealData

HELP = "Choose real images instead of learning synthetic ones: the baselines of the coreset rows."
EPILOG = f"""\
methods:
{textwrap.indent(table(described("speedk.distillation.coresets")), "  ")}
Where images are compared by features, or by what is forgotten, a network is first trained on the whole data set. It is
kept in the cache, so another method or --ipc is quick. DIR then holds distilled.safetensors, which every command reads,
and preview.png.

examples:
  speedk coreset --method herding --dataset digits --ipc 10 --evaluate
  speedk coreset --method random --dataset cifar10 --data DIR --out runs/random
"""
LOWER = "lower --ipc, or choose with a smaller --network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", metavar="NAME", required=True,
                        help=_options.plugins("speedk.distillation.coresets"))
    parser.add_argument("--dataset", metavar="NAME", help="the data to choose from (default: digits, without --data)")
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="the folder with that data, or one with a folder of its name, or your own images")
    _options.add_split(parser)
    parser.add_argument("--ipc", metavar="N", type=int, default=1, help="images of each class (default: 1)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the file goes (default: a folder under runs/)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--network", metavar="NAME", default="convnet", help="that is trained (default: convnet)")
    parser.add_argument("--epochs", metavar="N", type=int, help=f"of its training (default: {WHOLE.epochs})")
    _options.add_device(parser)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the file at the end (protocol quick)")


def run(args: argparse.Namespace) -> int:
    from speedk import data
    from speedk.cli.evaluate import conclude
    from speedk.distillation import coreset
    from speedk.distillation.rundir import holds_a_run

    _check(args)
    device, epochs = _testing.device(args.device), args.epochs or WHOLE.epochs
    name = args.dataset or ("digits" if args.data is None else None)
    real = data.load(name, args.data, split=args.split)
    coreset.class_sizes(real, args.ipc)  # before there is a folder
    out = args.out or Path("runs") / f"{real.name}-ipc{args.ipc}-{args.method}-seed{args.seed}"
    path = out / runfiles.DISTILLED
    if holds_a_run(out):
        raise ConfigError(f"{out} already holds a distilled file, or a run that makes one; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    rows = coreset.choose(real, args.method, args.ipc, seed=args.seed, network=args.network, epochs=epochs,
                          device=device)
    coreset.save(path, real, rows, args.method, seed=args.seed, network=args.network, epochs=epochs)
    preview = path.with_name(runfiles.PREVIEW)
    write_atomic(preview, _picture(real, rows))
    print(f"{path}: {len(rows):,} {_says(args.method)}, {args.ipc} of each of {real.geometry.classes} classes")
    print(f"{preview}: what was chosen")
    if args.evaluate:
        from speedk.evaluation import evaluate

        print()
        conclude(evaluate(path, real, protocol="quick", device=device), path.with_name(runfiles.EVALUATION))
    else:
        print(f"next: speedk evaluate {path} --protocol quick")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any data are read."""
    from speedk import networks, registry
    from speedk.distillation import coresets, recipe

    registry.find(coresets, args.method)
    networks.given(args.network)
    for option, value, least in (("--ipc", args.ipc, 1), ("--epochs", args.epochs, 1), ("--seed", args.seed, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option} {value} must be at least {least}")
    if args.seed > recipe.MAX_SEED:
        raise ConfigError(f"--seed {args.seed} must be at most {recipe.MAX_SEED:,}")


def _says(method: str) -> str:
    from speedk import registry
    from speedk.distillation import coresets

    return registry.find(coresets, method).says


def _picture(real: RealData, rows: Tensor) -> bytes:
    """PNG, of as many classes and images of each as the preview of a run, in the order of their choice."""
    from speedk import pictures
    from speedk.distillation.rundir import PREVIEW_CLASSES, PREVIEW_COLUMNS

    classes = min(PREVIEW_CLASSES, real.geometry.classes)
    images = real.train.images[rows.to(real.train.images.device)].float().cpu() / 255
    each = images.split(len(rows) // real.geometry.classes)
    return pictures.grid([part[:PREVIEW_COLUMNS] for part in each[:classes]], list(real.class_names))
