"""speedk distill: from real images to one small file."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli import _options
from speedk.distillation import runfiles
from speedk.errors import Interrupted

if TYPE_CHECKING:
    from speedk.distillation.plan import Plan

HELP = "Distil a data set into one file of a few hundred kilobytes that networks can be trained on."
EPILOG = """\
Without arguments the embedded digits are distilled. A run directory holds distilled.safetensors, recipe.toml,
log.jsonl, preview.png, TensorBoard events and checkpoints; a stopped run goes on with --resume.

examples:
  speedk distill
  speedk distill --dataset imagenette --ipc 1
  speedk distill --dataset cifar10 --data DIR --method pixels --steps 1000
  speedk distill --data my_images/ --ipc 5 --dry-run
  speedk distill --dataset cifar10 k=24 images_per_class=30 rates.scm=0.02
  speedk distill --out runs/mine --resume
  speedk distill --out runs/mine --resume --minutes 50
"""
LOWER = "lower batch (as in batch=64), images_per_class or the resolution"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fields", metavar="key=value", nargs="*",
                        help="a recipe field, by its name or as table.name (see `speedk recipes show`)")
    parser.add_argument("--dataset", metavar="NAME", help="digits, cifar10, cifar100, tinyimagenet, imagenette, "
                        "imagewoof, imagefruit, imagemeow, imagesquawk or imageyellow (default: digits)")
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="a folder of images: parquet files, or train/ and test/ with a folder per class; of a "
                        "named data set also one with a folder of its name")
    parser.add_argument("--ipc", metavar="N", type=int, help="images per class whose storage may be used (default: 1)")
    _options.add_method(parser)
    parser.add_argument("--objective", metavar="NAME", default="auto",
                        help=f"what is matched: {_options.plugins('speedk.distillation.objectives')}; auto is the "
                        "paper's (tm) on a GPU, else dm")
    _options.add_network(parser)
    parser.add_argument("--recipe", metavar="NAME|FILE", help="see `speedk recipes` (default: that of the row)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run directory (default: under runs/)")
    parser.add_argument("--seed", metavar="S", type=int, help="of everything random (default: 0)")
    _options.add_device(parser)
    parser.add_argument("--steps", metavar="N", type=int, help="outer iterations (default: the recipe's)")
    parser.add_argument("--minutes", metavar="M", type=float, help="stop after so long, but not within the fit of the "
                        "start (fit_steps): the file is written as the set then is, and --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the file at the end (protocol quick)")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the recipe, the budget and an estimate of time and memory, and stop")


def run(args: argparse.Namespace) -> int:
    from speedk.cli._progress import Bars
    from speedk.distillation import plan as plans
    from speedk.distillation.recipe import parse_overrides

    _options.check_minutes("--minutes", args.minutes)
    made = plans.plan(args.dataset, data=args.data, ipc=args.ipc, method=args.method, objective=args.objective,
                      recipe=args.recipe, out=args.out, seed=args.seed, device=args.device, steps=args.steps,
                      network=args.network, overrides=parse_overrides(args.fields), resume=args.resume, progress=True)
    _announce(made)
    if args.dry_run:
        _dry_run(made, args.minutes)
        return 0
    bars = Bars()
    try:
        path = made.run(resume=args.resume, progress=bars.progress(), minutes=args.minutes)
    except Interrupted as stop:
        bars.close()
        print(f"{stop}; go on with: {_to_go_on(made, args)}")
        return 130
    finally:
        bars.close()
    _conclude(made, path)
    if args.minutes is not None:
        _say_how_far(made, path, args)
    print(f"next: speedk evaluate {path} --protocol quick")
    if args.evaluate:
        from speedk.cli.evaluate import conclude
        from speedk.evaluation import evaluate

        print()
        conclude(evaluate(path, made.real, protocol="quick", device=made.device), path.with_name(runfiles.EVALUATION))
    return 0


def _to_go_on(made: Plan, args: argparse.Namespace) -> str:
    """The command that resumes `made` to the same bytes: with what its run directory does not say."""
    network = made.recipe.objective.network
    words = ["speedk", "distill", "--out", made.out, "--resume"]
    words += ["--data", args.data] if args.data is not None else []
    words += ["--device", args.device] if args.device != "auto" else []
    words += ["--network", network] if ":" in network else []  # code is never taken from a run directory
    return shlex.join(map(str, words))


def _announce(made: Plan) -> None:
    """What will be done, before anything starts."""
    from speedk.distillation.plan import PAPER_OBJECTIVE, choose, preparation, trajectory_seconds
    from speedk.text import duration, table

    real, recipe = made.real, made.recipe
    note = f"; {real.note}" if real.note else ""
    spent = recipe.budget(real.geometry)
    rows = [
        ("data", f"{real.name}, split {real.split}, {len(real.train):,} training and {len(real.test):,} test images of "
                 f"{real.geometry.shape}, {real.geometry.classes} classes{note}"),
        ("recipe", f"{recipe.about.name} ({recipe.about.row}), seed {recipe.run.seed}, protocol "
                   f"{recipe.run.protocol}"),
        *(("", text) for text in made.notes),
        ("storage", f"{spent.counted:,.0f} of {spent.allowed:,} float32 numbers (ipc {recipe.data.ipc})"
                    + (", budget off" if recipe.data.budget == "off" else "")),
        ("objective", made.chosen),
    ]
    if recipe.objective_name != PAPER_OBJECTIVE and made.chosen == choose("auto", made.device)[1]:
        iteration, total = trajectory_seconds(made, _facts(made))
        rows.append(("", f"trajectory matching would take about {duration(iteration)} an iteration and "
                         f"{duration(total)} in all on this {made.device.type}"))
    needs, seconds = preparation(made)
    if needs:
        rows.append(("", needs + (f", about {duration(seconds)} on this {made.device.type}" if seconds else "")))
    rows += [("device", str(made.device)), ("run", str(made.out))]
    print(table(rows), flush=True)


def _facts(made: Plan) -> dict:
    """The tables of the shipped recipe that `made` came from, or of SPEED's for the same row: the settings of the other
    objectives."""
    from speedk.distillation import recipe as recipes

    name = made.recipe.about.name
    if name not in recipes.shipped():
        name = recipes.find_row(made.recipe.data.name, made.recipe.data.ipc, "speed")
    return recipes.read(name) if name else {}


def _dry_run(made: Plan, minutes: float | None) -> None:
    from speedk.distillation import recipe as recipes
    from speedk.distillation.plan import ESTIMATE_STEPS, estimate
    from speedk.text import duration

    print(f"\nrecipe, resolved:\n\n{recipes.to_toml(made.recipe.to_dict())}")
    print(f"budget (float32 numbers):\n{made.recipe.budget(made.real.geometry).table()}\n")
    measured = estimate(made)
    steps = made.recipe.objective.steps
    print(f"time    about {duration(measured.seconds(steps))}: the start {duration(measured.start_seconds)}, then "
          f"{steps:,} steps of {duration(measured.step_seconds)} (measured over {ESTIMATE_STEPS})")
    if minutes is not None and 60 * minutes < measured.seconds(steps):
        fit = max(1, int((60 * minutes - measured.start_seconds) / max(measured.step_seconds, 1e-9)))
        print(f"        in {duration(60 * minutes)} about {fit:,} of these steps")
    print(f"memory  peak of {measured.peak_bytes / 2**30:.2f} GiB so far on {made.device}, the data among it")


def _conclude(made: Plan, path: Path) -> None:
    spent = made.recipe.budget(made.real.geometry)
    print(f"\n{path}: {path.stat().st_size:,} bytes, {spent.counted:,.0f} float32 numbers counted of {spent.allowed:,}")
    print(f"{path.with_name(runfiles.PREVIEW)}: what was distilled")


def _say_how_far(made: Plan, path: Path, args: argparse.Namespace) -> None:
    from speedk.distillation import artifact

    done, steps = artifact.load(path).header["objective"].get("steps"), made.recipe.objective.steps
    if done is not None:
        print(f"the minutes were over after {done:,} of {steps:,} steps; go on with: {_to_go_on(made, args)}")
