"""speedk reproduce: the runs behind a table of the paper, and the page that sets both numbers beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.evaluation.tables import Cell, Target

HELP = "Run the rows of a table of the paper, and write what was published and what was measured."
EPILOG = """\
Without TABLE it lists the tables and their rows. A run that is finished is not run again, one that was stopped goes on.
FILE gets a line of JSON for each cell that was measured; the page beside it (FILE with .md) is made of these lines.

examples:
  speedk reproduce
  speedk reproduce 3 --row "DM with SPEED" --column "ConvNet, 1" --data DIR
  speedk reproduce 3 --row DM --row "DM with SPEED" --data DIR --budget 60 --protocol quick
  speedk reproduce 1 --row Herding --data DIR --results docs/results.jsonl
"""
LOWER = "lower batch (as in batch=64), or test fewer networks at a time (--column)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fields", metavar="TABLE [key=value]", nargs="*",
                        help="1 to 10, I, II, ... of the paper; recipe fields that shall differ (for a coreset: "
                        "epochs=N of its network), which the page says")
    parser.add_argument("--row", metavar="ROW", action="append", default=[], help="only this one; may be said again")
    parser.add_argument("--column", metavar="NAME", action="append", default=[],
                        help="only this one; may be said again")
    parser.add_argument("--budget", metavar="MINUTES", type=float, help="of distilling, shared by the runs; what is "
                        "not finished is evaluated as it is, and goes on the next time (evaluation comes on top)")
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="the folder of the data set, or one with a folder for each, by its name")
    parser.add_argument("--protocol", choices=("paper", "quick"), default="paper", help="default: paper")
    parser.add_argument("--runs", metavar="N", type=int, default=5, help="networks of each kind (default: 5)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of distilling (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/tables"),
                        help="where the runs go (default: runs/tables)")
    parser.add_argument("--results", metavar="FILE", type=Path, default=Path("results.jsonl"),
                        help="the lines, and beside it the page (default: results.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs, and stop")


def run(args: argparse.Namespace) -> int:
    from speedk.distillation.loop import OutOfTime
    from speedk.distillation.recipe import parse_overrides
    from speedk.evaluation import tables

    names = [word for word in args.fields if "=" not in word]
    changed = parse_overrides([word for word in args.fields if "=" in word])
    _check(args, names)
    lines = tables.read(args.results)
    if not names:
        print(_listing(lines))
        return 0
    cells = tables.table(names[0]).select(args.row, args.column)
    runs: dict[Target, list[Cell]] = {}
    for cell in cells:
        runs.setdefault(cell.target, []).append(cell)
    for target in runs:
        _check_changed(target, changed)
    if args.dry_run:
        for target, of_run in runs.items():
            print(_command(target, of_run, args))
        return 0
    real: dict[tuple[str, int], RealData] = {}
    for number, (target, of_run) in enumerate(runs.items(), 1):
        print(f"\nrun {number} of {len(runs)}: {_command(target, of_run, args)}", flush=True)
        try:
            measured = _measure(target, of_run, args, changed, real, args.budget and args.budget / len(runs))
        except OutOfTime as stop:
            print(f"{stop}; nothing is measured yet, the same command goes on")
            continue
        except Interrupted as stop:
            raise Interrupted(f"{stop}; the same command goes on") from None
        found = [tables.cell_line(cell, measured | ({"changed": changed} if changed else {})) for cell in of_run]
        tables.append(args.results, found)
        for line in found:
            ours = "failed" if line["mean"] is None else f"{line['mean']:.1f}±{line['std']:.1f}"
            print(f"table {line['table']}, {line['row']}, {line['column']}: published {line['published']}, ours {ours}"
                  + (f" after {line['steps']:,} of {line['steps_of']:,} steps" if line["steps"] < line["steps_of"]
                     else ""))
    print(f"\n{args.results}\n{tables.write_page(args.results)}")
    return 0


def _check(args: argparse.Namespace, names: list[str]) -> None:
    if len(names) > 1:
        raise ConfigError(f"one table at a time, not {' and '.join(names)}; rows are named with --row")
    if args.budget is not None and not args.budget > 0:
        raise ConfigError(f"--budget {args.budget:g} must be above 0 minutes")
    if args.runs < 1 or args.seed < 0:
        raise ConfigError(f"--runs {args.runs} must be at least 1, and --seed {args.seed} not negative")
    if args.results.suffix == ".md":
        raise ConfigError(f"--results {args.results} is for lines of JSON: the page is written beside it")
    if not args.results.parent.is_dir():
        raise ConfigError(f"--results {args.results}: {args.results.parent} is not a folder, create it first")


def _check_changed(target: Target, changed: dict[str, Any]) -> None:
    """Raises ConfigError where `changed` says what the run does not have."""
    if target.kind == "coreset" and changed.keys() <= {"epochs"}:
        epochs = changed.get("epochs", 1)
        if not isinstance(epochs, int) or epochs < 1:
            raise ConfigError(f"epochs={epochs} must be a whole number of at least 1")
    elif target.kind != "recipe" and changed:
        raise ConfigError("key=value changes a recipe (of a coreset: epochs=N), and some of these rows have none: name "
                          "the rows with --row")


def _listing(lines: list[dict[str, Any]]) -> str:
    from speedk.cli._text import table
    from speedk.evaluation import tables

    known = {(line["table"], line["row"], line["column"]) for line in lines}
    rows = [("table", "row", "cells", "measured", "run")]
    for found in tables.tables().values():
        rows.append((found.name, found.title, "", "", ""))
        for row in found.rows:
            cells = [cell for cell in found.cells if cell.row == row and cell.published]
            done = sum((cell.table, cell.row, cell.column) in known for cell in cells)
            target = cells[0].target
            what = "not part of speedk" if target is None else target.objective or target.name or "whole data set"
            rows.append(("", f"  {row}", str(len(cells)), str(done) if target else "", what))
    return table(rows, numbers=(2, 3))


def _command(target: Target, cells: list[Cell], args: argparse.Namespace) -> str:
    """The run as one would type it, without the evaluation's options."""
    networks = ",".join(dict.fromkeys(cell.network for cell in cells))
    data = f" --data {_folder(target, args)}" if args.data is not None else ""
    if target.kind == "coreset":
        epochs = "".join(f" --{word.replace('=', ' ')}" for word in args.fields if "=" in word)
        return f"speedk coreset --dataset {target.dataset} --ipc {target.ipc} --method {target.name}{data}{epochs}"
    if target.kind == "whole":
        return f"speedk evaluate --whole --dataset {target.dataset} --networks {networks}{data}"
    fields = "".join(f" {name}={value}" for name, value in target.fields)
    fields += "".join(f" {word}" for word in args.fields if "=" in word)
    return f"speedk distill --recipe {target.name} --objective {target.objective}{fields}{data}"


def _folder(target: Target, args: argparse.Namespace) -> Path | None:
    """The folder of the target's data set: one of its name in --data, or --data itself."""
    return args.data if args.data is None or not (args.data / target.dataset).is_dir() else args.data / target.dataset


def _measure(target: Target, cells: list[Cell], args: argparse.Namespace, changed: dict[str, Any],
             known: dict[tuple[str, int], RealData], minutes: float | None) -> dict[str, Any]:
    """The run of `target`, its networks those of `cells`; `known` keeps data sets in memory."""
    from speedk import data
    from speedk.cli import _testing
    from speedk.cli._progress import Bars
    from speedk.distillation import plan as plans
    from speedk.evaluation import cell as cell_of

    how = cell_of.Evaluation(tuple(dict.fromkeys(cell.network for cell in cells)), args.runs, args.protocol)
    folder = _folder(target, args)
    side = 256 if target.data != target.dataset else 0
    if (target.dataset, side) not in known:
        known.clear()  # one at a time: ImageNet's subsets are large
        known[target.dataset, side] = data.load(target.dataset, folder, resolution=side or None)
    real = known[target.dataset, side]
    out = args.out / "-".join([target.folder, *(f"{name}={value}" for name, value in sorted(changed.items())),
                               f"seed{args.seed}"])
    if target.kind == "coreset":
        return cell_of.measure_coreset(real, target.name, target.ipc, how, out, seed=args.seed,
                                       device=_testing.device(args.device), **changed)
    if target.kind == "whole":
        return cell_of.measure_whole(real, how, out, device=_testing.device(args.device))
    made = plans.plan(recipe=target.name, data=folder, objective=target.objective, out=out, seed=args.seed,
                      device=args.device, overrides={**dict(target.fields), **changed}, real=real)
    bars = Bars()
    try:
        return cell_of.measure(made, how, minutes=minutes, progress=bars.progress())
    finally:
        bars.close()
