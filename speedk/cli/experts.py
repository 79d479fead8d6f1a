"""speedk experts: the trajectories that `speedk distill --objective tm` matches."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.cli import _options
from speedk.errors import ConfigError
from speedk.precision import PRECISIONS

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.distillation.experts.folder import ExpertFolder

HELP = "Train the expert trajectories that trajectory matching needs, or print what a folder of them holds."
EPILOG = """\
`speedk distill --objective tm` makes what it needs of them by itself; this makes them beforehand, in another place
(--out), or in several processes at once, which share the work where they are given one folder. Ctrl-C and SIGTERM keep
every finished epoch, a kill all but those of the last half minute: the same command goes on. A larger --count or
--epochs extends a folder; what is there is kept.

examples:
  speedk experts --dataset cifar10 --ipc 1 --count 20
  speedk experts --data my_images/ --out experts/mine --epochs 20 expert_rate=0.02
  speedk distill --data my_images/ --objective tm experts=experts/mine
  speedk experts info experts/mine
"""
LOWER = "lower expert_batch (as in expert_batch=64)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fields", metavar="info DIR | key=value", nargs="*",
                        help="print what DIR holds; or a recipe field (expert_rate, expert_batch, standardise, ...)")
    parser.add_argument("--dataset", metavar="NAME", help="as for distill (default: digits)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="a folder, as for distill")
    parser.add_argument("--ipc", metavar="N", type=int, help="the row whose recipe says how to train (default: 1)")
    parser.add_argument("--recipe", metavar="NAME|FILE",
                        help="the recipe that says how to train (default: the row's for SPEED, which reads the most)")
    parser.add_argument("--count", metavar="N", type=int, help="experts (default: the recipe's, or 100)")
    parser.add_argument("--epochs", metavar="E", type=int, help="of each (default: as many as the recipe can read)")
    _options.add_network(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: the user's cache, where distill looks")
    parser.add_argument("--seed", metavar="S", type=int, help="of everything random (default: the recipe's, or 0)")
    _options.add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32",
                        help="of the stored parameters (default: float32; bf16 needs --out)")


def run(args: argparse.Namespace) -> int:
    if args.fields and args.fields[0] == "info":
        if len(args.fields) != 2:
            raise ConfigError("say which: speedk experts info DIR")
        return _info(Path(args.fields[1]))
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    from speedk.cli._progress import Bars
    from speedk.distillation import experts
    from speedk.distillation import plan as plans
    from speedk.distillation import recipe as recipes
    from speedk.distillation.experts.folder import ExpertFolder
    from speedk.distillation.objectives import tm
    from speedk.text import counted, duration, table

    if args.precision != "float32" and args.out is None:
        raise ConfigError(f"--precision {args.precision} is for a folder of your own: say --out, and experts=DIR to "
                          "distill")
    if args.epochs is not None and args.epochs < 1:
        raise ConfigError(f"--epochs {args.epochs} is nothing to train: say at least 1")
    # Nothing is distilled, so nothing can exceed the budget.
    fields = {"data.budget": "off", **recipes.parse_overrides(args.fields)}
    for name, value in (("objective.network", args.network), ("objective.expert_seed", args.seed),
                        ("objective.expert_count", args.count)):
        if value is not None:
            fields[name] = value
    # Of a row's recipes SPEED's reads the most epochs, so what it needs serves the others too. Where it has none, all
    # methods match alike, and the sizes of pixels need not be solved for.
    named = args.dataset or ("" if args.data else "digits")
    method = "speed" if recipes.find_row(named, args.ipc or 1, "speed") else "pixels"
    made = plans.plan(args.dataset, data=args.data, ipc=args.ipc, method=None if args.recipe else method,
                      recipe=args.recipe, objective="tm", device=args.device, overrides=fields, progress=True,
                      load=functools.partial(_load, args.out, fields))
    spec, real = made.recipe.objective, made.real
    identity = tm.expert_identity(spec, real, args.precision)
    epochs = spec.epochs if args.epochs is None else args.epochs
    folder = ExpertFolder.create(args.out or experts.place(identity), identity)
    need = experts.missing(folder, spec.expert_count, epochs)
    seconds = need and need * experts.epoch_seconds(identity, real, spec.expert_count, made.device)
    print(table([
        ("data", f"{real.name}, split {real.split}, {len(real.train):,} training images"
                 + (f"; {real.note}" if real.note else "")),
        ("experts", f"{spec.expert_count} of {identity.network}, {identity.parameters:,} parameters, "
                    f"{counted(epochs, 'epoch')} at {identity.rate:g}, batch {identity.batch}"
                    + (", standardised" if identity.standardise else "") + f", seed {identity.seed}"),
        ("folder", str(folder.path)),
        ("to train", f"{need:,} of {counted(spec.expert_count * epochs, 'epoch')}, about {duration(seconds)} on "
                     f"this {made.device.type}"),
    ]), flush=True)
    bars = Bars()
    try:
        experts.train(folder, real, spec.expert_count, epochs, made.device, progress=bars.progress().experts)
    except KeyboardInterrupt:
        bars.close()
        raise KeyboardInterrupt(f"interrupted; every finished epoch is in {folder.path}, and the same command goes "
                                "on") from None
    finally:
        bars.close()
    print(f"\n{_summary(folder)}")
    return 0


def _load(out: Path | None, fields: dict[str, Any], name: str | None, *where: Any, **how: Any) -> RealData:
    """Read the data; but where `out` holds experts of other data, or of another network, say so before that takes its
    time. `ExpertFolder.create` looks at the rest."""
    from speedk import data
    from speedk.data import catalogue
    from speedk.distillation.experts.folder import IDENTITY_FILE, ExpertFolder

    if out is not None and (out / IDENTITY_FILE).exists():
        there, network = ExpertFolder.open(out).identity, fields.get("objective.network", fields.get("network"))
        for wanted, found in ((name if there.dataset in catalogue.CATALOGUE else None, there.dataset),
                              (network, there.network)):
            if wanted and wanted != found:
                raise ConfigError(f"{out} holds experts of {found}, not {wanted}: choose another folder")
    return data.load(name, *where, **how)


def _info(path: Path) -> int:
    from speedk.distillation.experts.folder import ExpertFolder
    from speedk.errors import one_line
    from speedk.text import table

    folder = ExpertFolder.open(path)
    of = folder.identity
    print(table([
        ("folder", str(path)),
        ("data", f"{one_line(of.dataset)}, {of.geometry.shape}, {of.classes} classes"),
        ("data hash", one_line(of.data)),
        ("normaliser", one_line(", ".join(f"{key} {value}" for key, value in of.normaliser.items()))),
        ("network", f"{of.network}, {of.parameters:,} parameters, stored as {of.precision}"),
        ("training", f"plain SGD at {of.rate:g}, batch {of.batch}, {'DSA' if of.augment else 'no augmentation'}"
                     + (", batches standardised" if of.standardise else "") + f", seed {of.seed}"),
    ]))
    print(f"\n{_summary(folder)}")
    return 0


def _summary(folder: ExpertFolder) -> str:
    """How many experts have how many epochs, and how good they are."""
    from speedk.text import table

    records = [folder.record(number) for number in folder.numbers()]
    if not records:
        return f"no experts yet in {folder.path}"
    rows = [("epoch", "experts", "accuracy", "from", "to")]
    for epoch in range(max(record.epochs for record in records) + 1):
        found = [100 * record.accuracies[epoch] for record in records if record.epochs >= epoch]
        rows.append((str(epoch), str(len(found)), f"{sum(found) / len(found):.1f} %", f"{min(found):.1f}",
                     f"{max(found):.1f}"))
    said = table(rows, numbers=range(5))
    return f"{said}\n\naccuracy on up to 1,000 test images, for information: nothing is chosen by it"
