"""speedk reproduce: the runs behind a table of the paper, and the page that sets both numbers beside each other."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.cli import _options, _testing, name_failed
from speedk.cli._files import flat
from speedk.errors import ConfigError, Interrupted, TrainingError
from speedk.schedule import STANDARDISATIONS

if TYPE_CHECKING:
    from speedk.data import RealData
    from speedk.evaluation.paper.tables import Cell, Target

HELP = "Run the rows of a table of the paper, and write what was published and what was measured."
EPILOG = """\
Without TABLE it lists the tables and their rows. A run that is finished is not run again, one that was stopped goes on;
where one fails, the others are run all the same. FILE gets a line of JSON for each cell that was measured; the page
beside it (FILE with .md) is made of these lines after each run.

examples:
  speedk reproduce
  speedk reproduce 3 --row "DM with SPEED" --column "ConvNet, 1" --data DIR
  speedk reproduce 3 --row DM --row "DM with SPEED" --data DIR --budget 60 --protocol quick
  speedk reproduce 1 --row Herding --data DIR --results docs/results.jsonl
"""
LOWER = "lower batch (as in batch=64), or test fewer networks at a time (--column)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fields", metavar="TABLE [key=value]", nargs="*",
                        help="1 to 10, I, II, ... of the paper; recipe fields that shall differ, which the page says "
                        "(of a coreset: split, protocol, and epochs of its network; of the whole data set: split, "
                        "protocol)")
    parser.add_argument("--row", metavar="ROW", action="append", default=[], help="only this one; may be said again")
    parser.add_argument("--column", metavar="NAME", action="append", default=[],
                        help="only this one; may be said again")
    parser.add_argument("--budget", metavar="MINUTES", type=float, help="of distilling, shared by the recipes' runs "
                        "that are not finished; one that is not then is evaluated as it is, and goes on the next time. "
                        "The fit of a start (fit_steps) is not cut short; on top come evaluation, and the networks of "
                        "coresets and of the whole data set")
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="the folder of the data set, or one with a folder for each, by its name")
    _options.add_evaluation(parser, "paper")
    parser.add_argument("--seed", metavar="S", type=int, help="of distilling (default: 0)")
    _options.add_device(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/tables"),
                        help="where the runs go (default: runs/tables)")
    parser.add_argument("--results", metavar="FILE", type=Path, default=Path("results.jsonl"),
                        help="the lines, and beside it the page (default: results.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs, and stop")


def run(args: argparse.Namespace) -> int:
    from speedk import data
    from speedk.distillation.loop import OutOfTime
    from speedk.distillation.recipe import parse_overrides
    from speedk.evaluation.paper import tables

    names = [word for word in args.fields if "=" not in word]
    changed = parse_overrides([word for word in args.fields if "=" in word])
    _check(args, names)
    args.seed = _seed(args.seed, changed)
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
            print(_command(target, of_run, args, changed))
        return 0
    load = functools.lru_cache(maxsize=1)(data.load)  # one at a time: ImageNet's subsets are large
    minutes = _Minutes(args.budget, [_out(target, args, changed) for target in runs if target.kind == "recipe"])
    failed = []
    for number, (target, of_run) in enumerate(runs.items(), 1):
        print(f"\nrun {number} of {len(runs)}: {_command(target, of_run, args, changed)}", flush=True)
        try:
            with minutes.share(_out(target, args, changed)) as share:
                measured = _measure(target, of_run, args, changed, load, share)
        except OutOfTime as stop:
            print(f"{stop}; nothing is measured yet, the same command goes on")
            continue
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted(f"{str(stop) or 'interrupted'}; the same command goes on") from None
        except Exception as error:
            if len(runs) == 1:
                raise
            name_failed(_named(of_run), error, LOWER)
            failed.append(_named(of_run))
            continue
        said = _portable(target, changed)
        found = [tables.cell_line(cell, measured | ({"changed": said} if said else {})) for cell in of_run]
        tables.append(args.results, found)
        tables.write_page(args.results)
        for line in found:
            print(f"table {line['table']}, {line['row']}, {line['column']}: published {line['published']}, ours "
                  + tables.accuracy(line)
                  + (f" after {line['steps']:,} of {line['steps_of']:,} steps" if line["steps"] < line["steps_of"]
                     else ""))
        if bad := [cell for cell, line in zip(of_run, found, strict=True) if line["mean"] is None]:
            failed.append(_named(bad))
    print(f"\n{args.results}\n{tables.write_page(args.results)}")
    if failed:
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    return 0


class _Minutes:
    """Those of --budget, or None: the runs `outs` that are not finished share what is left of them, so that what one of
    them does not use is for the others."""

    def __init__(self, budget: float | None, outs: list[Path]) -> None:
        from speedk.evaluation import cell

        self.left = budget
        self.waiting = [] if budget is None else [out for out in outs if not cell.finished(out)]

    @contextlib.contextmanager
    def share(self, out: Path) -> Iterator[float | None]:
        """The minutes of the run `out`, which are taken off as far as it distils."""
        from speedk.evaluation import cell

        if out not in self.waiting:
            yield self.left  # it has nothing left to distil
            return
        before = cell.seconds(out)
        try:
            yield max(0.0, self.left) / len(self.waiting)
        finally:
            self.left -= (cell.seconds(out) - before) / 60
            self.waiting.remove(out)


def _named(cells: list[Cell]) -> str:
    """The cells of one run, in words."""
    return f"{cells[0].row} ({', '.join(cell.column for cell in cells)})"


def _check(args: argparse.Namespace, names: list[str]) -> None:
    if len(names) > 1:
        raise ConfigError(f"one table at a time, not {' and '.join(names)}; rows are named with --row")
    _options.check_minutes("--budget", args.budget)
    if args.runs < 1:
        raise ConfigError(f"--runs {args.runs} must be at least 1")
    if args.results.suffix == ".md":
        raise ConfigError(f"--results {args.results} is for lines of JSON: the page is written beside it")
    if not args.results.parent.is_dir():
        raise ConfigError(f"--results {args.results}: {args.results.parent} is not a folder, create it first")


def _seed(asked: int | None, changed: dict[str, Any]) -> int:
    """The seed of distilling, from --seed or from `changed`, out of which it is taken."""
    from speedk.distillation.recipe import MAX_SEED

    said = [changed.pop(key) for key in ("seed", "run.seed") if key in changed] + ([] if asked is None else [asked])
    if any(value != said[0] for value in said):
        raise ConfigError(f"the seeds {' and '.join(map(str, said))} do not agree: leave one of them out")
    seed = said[0] if said else 0
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed={seed} is not from 0 to {MAX_SEED:,}")
    return seed


def _check_changed(target: Target, changed: dict[str, Any]) -> None:
    """Raises ConfigError where `changed` says what the run does not have, or what cannot be run."""
    from speedk import networks
    from speedk.distillation import recipe as recipes
    from speedk.evaluation.paper import published

    if fixed := {"name", "data.name", "ipc", "data.ipc"} & set(changed):
        raise ConfigError(f"{fixed.pop()} is not to be changed here: --column says the data set and the images a class")
    if target.kind == "recipe":
        recipe = published.resolved(target, changed)
        networks.given(recipe.objective.network)
        recipe.budget(recipes.geometry(recipe))
        return
    for name, value in changed.items():
        if name not in ("split", "protocol", *(["epochs"] if target.kind == "coreset" else [])):
            raise ConfigError(f"{name}=... changes a recipe (of a coreset: epochs=N, split, protocol; of the whole "
                              "data set: split, protocol), and some of these rows have none: name the rows with --row")
        if name == "protocol" and value not in STANDARDISATIONS:
            raise ConfigError(f"protocol={value!r} is not one of {', '.join(STANDARDISATIONS)}")
        if name == "epochs" and (type(value) is not int or value < 1):
            raise ConfigError(f"epochs={value} must be a whole number of at least 1")


def _portable(target: Target, changed: dict[str, Any]) -> dict[str, Any]:
    """`changed` without places on this machine, which the page of results is no place for."""
    from speedk.evaluation.paper import published

    if target.kind != "recipe":
        return changed
    local = published.resolved(target, changed).objective.LOCAL
    return {name: value for name, value in changed.items() if name.rpartition(".")[2] not in local}


def _listing(lines: list[dict[str, Any]]) -> str:
    from speedk.evaluation.paper import tables
    from speedk.text import table

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


def _command(target: Target, cells: list[Cell], args: argparse.Namespace, changed: dict[str, Any]) -> str:
    """The run as one would type it, without the evaluation's options but for what is `changed` of it."""
    networks = ",".join(dict.fromkeys(cell.network for cell in cells))
    data = f" --data {args.data}" if args.data is not None else ""
    seed = f" --seed {args.seed}" if args.seed else ""
    if target.kind == "recipe":
        fields = "".join(f" {name}={value}" for name, value in (*target.fields, *changed.items()))
        return f"speedk distill --recipe {target.name} --objective {target.objective}{fields}{data}{seed}"
    split = f" --split {changed['split']}" if "split" in changed else ""
    how = f" --standardisation {changed['protocol']}" if "protocol" in changed else ""
    if target.kind == "coreset":
        epochs = f" --epochs {changed['epochs']}" if "epochs" in changed else ""
        chosen = (f"speedk coreset --dataset {target.dataset} --ipc {target.ipc} --method {target.name}{data}{split}"
                  f"{epochs}{seed}")
        out = _out(target, args, changed)
        # The set is the same, and its evaluation another: that is a command of its own.
        return f"{chosen} --out {out} && speedk evaluate {out} --networks {networks}{data}{how}" if how else chosen
    return f"speedk evaluate --whole --dataset {target.dataset} --networks {networks}{data}{split}{how}"


def _out(target: Target, args: argparse.Namespace, changed: dict[str, Any]) -> Path:
    """The run directory of `target`."""
    fields = [f"{name}={value}" for name, value in sorted(changed.items())]
    return args.out / flat("-".join([target.folder, *fields, f"seed{args.seed}"]))


def _measure(target: Target, cells: list[Cell], args: argparse.Namespace, changed: dict[str, Any],
             load: Callable[..., RealData], minutes: float | None) -> dict[str, Any]:
    """The run of `target`, its networks those of `cells`; `load` is `speedk.data.load`, or as good."""
    from speedk.cli._progress import Bars
    from speedk.distillation import plan as plans
    from speedk.evaluation import cell as cell_of

    how = cell_of.Evaluation(tuple(dict.fromkeys(cell.network for cell in cells)), args.runs, args.protocol,
                             precision=args.precision)
    out = _out(target, args, changed)
    if target.kind == "recipe":
        made = plans.plan(recipe=target.name, data=args.data, objective=target.objective, out=out, seed=args.seed,
                          device=args.device, overrides={**dict(target.fields), **changed}, load=load)
        bars = Bars()
        try:
            return cell_of.measure(made, how, minutes=minutes, progress=bars.progress())
        finally:
            bars.close()
    how = dataclasses.replace(how, standardisation=changed.get("protocol"))
    real = load(target.dataset, args.data, resolution=256 if target.data != target.dataset else None,
                split=changed.get("split"))
    device = _testing.device(args.device)
    if target.kind == "whole":
        return cell_of.measure_whole(real, how, out, device=device)
    epochs = {"epochs": changed["epochs"]} if "epochs" in changed else {}
    return cell_of.measure_coreset(real, target.name, target.ipc, how, out, seed=args.seed, device=device, **epochs)
