"""speedk sweep: a grid over recipe fields, each cell distilled and evaluated."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.cli import _options, _testing, name_failed
from speedk.cli._files import flat
from speedk.errors import ConfigError, DataError, Interrupted, TrainingError

if TYPE_CHECKING:
    from speedk.distillation.plan import Plan
    from speedk.evaluation.cell import Evaluation

SWEEP = "sweep.jsonl"
HELP = "Distil and evaluate a grid over recipe fields, and draw accuracy against storage."
EPILOG = """\
Each cell is a run directory in DIR; one that is finished is not run again, one that was stopped goes on, and where one
fails, the others are run all the same. DIR then holds sweep.jsonl (a line a cell) and sweep.png. Cells over the storage
budget need budget=off, which leaves the others as they are. Where steps vary, time.png draws accuracy against the
seconds that distilling took, beside other sweeps' if asked.

examples:
  speedk sweep --recipe cifar10-ipc10-speed --data DIR k=12,24,48
  speedk sweep --recipe cifar10-ipc10-speed --data DIR k=24,48,96 budget=off --networks convnet,mlp
  speedk sweep --dataset digits k=6,12,24 sparsify=global,local --steps 60
  speedk sweep --recipe cifar100-ipc1-speed --data DIR H=1 images_per_class=33 --dry-run
  speedk sweep --recipe digits-ipc1-pixels steps=15,60,240 --out runs/pixels
  speedk sweep --recipe digits-ipc1-speed steps=15,60,240 --out runs/speed --compare runs/pixels/sweep.jsonl
"""
LOWER = "lower batch (as in batch=64), images_per_class or --runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fields", metavar="key=a,b,c", nargs="*",
                        help="a recipe field and its values, one value to fix it (see `speedk recipes show`)")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="see `speedk recipes` (default: that of the row)")
    parser.add_argument("--dataset", metavar="NAME", help="as for distill (default: the recipe's, or digits)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="a folder, as for distill")
    parser.add_argument("--ipc", metavar="N", type=int, help="images per class whose storage may be used (default: 1)")
    _options.add_method(parser)
    parser.add_argument("--objective", metavar="NAME", default="auto", help="as for distill (default: auto)")
    _options.add_network(parser)
    _options.add_networks(parser)
    _options.add_evaluation(parser, "quick")
    parser.add_argument("--epochs", metavar="N", type=int, help="of evaluation, in place of the protocol's")
    parser.add_argument("--steps", metavar="N", type=int, help="outer iterations (default: the recipe's)")
    parser.add_argument("--seed", metavar="S", type=int, help="of everything random in distilling (default: 0)")
    _options.add_device(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: under runs/")
    parser.add_argument("--compare", metavar="SWEEP", type=Path, nargs="+", default=[],
                        help="sweep.jsonl of earlier sweeps, whose cells are drawn in time.png as well")
    parser.add_argument("--dry-run", action="store_true", help="print the grid and its storage, and stop")


def run(args: argparse.Namespace) -> int:
    from speedk.cli import _curves

    grid = _grid(args.fields)
    how = _evaluation(args)
    earlier = [_earlier(path) for path in args.compare]
    plans = _plans(args, grid)
    varied, out = _varied(grid), plans[0].out.parent
    print(_listing(plans, grid, how), flush=True)
    if args.dry_run:
        return 0
    lines, failed = _measure(plans, grid, how)
    if lines:
        print(f"\n{_table(lines, varied)}\n\n{out / SWEEP}")
        _curves.draw(out / "sweep.png", lambda: _picture(lines, varied, plans[0]))
    if lines and (earlier or _steps(varied)):
        names = _curves.titles([path.resolve().parent.name for path in (out / SWEEP, *args.compare)])
        cells = dict(zip(names, (lines, *earlier), strict=True)) if earlier else {"": lines}
        _curves.draw(out / "time.png", lambda: _time(cells, plans[0]))
    if failed:
        raise TrainingError(f"{len(failed)} of {len(plans)} cells failed: {'; '.join(failed)}")
    return 0


def _measure(plans: list[Plan], grid: list[dict[str, Any]], how: Evaluation) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of the cells, which are written as they come, and the names of those that failed."""
    from speedk.cli._progress import Bars
    from speedk.evaluation import cell
    from speedk.files import write_atomic

    varied, lines, failed = _varied(grid), [], []
    for made, fields in zip(plans, grid, strict=True):
        name = _short({key: fields[key] for key in varied})
        known = cell.found(made, how) is not None
        print(f"\n{made.out}{': finished before' if known else ''}", flush=True)
        bars = Bars()
        try:
            line = cell.measure(made, how, progress=bars.progress())
        except Interrupted as stop:
            raise Interrupted(f"{stop}; the same command goes on") from None
        except Exception as error:
            bars.close()
            name_failed(name, error, LOWER)
            failed.append(name)
            continue
        finally:
            bars.close()
        lines.append({"fields": fields, **line})
        write_atomic(made.out.parent / SWEEP, "".join(json.dumps(entry) + "\n" for entry in lines).encode())
        failed += [name] if any(result["mean"] is None for result in line["results"]) else []
    return lines, failed


def _grid(pairs: list[str]) -> list[dict[str, Any]]:
    """["k=24,48", "R=1"] -> [{"k": 24, "R": 1}, {"k": 48, "R": 1}]: the first field varies slowest."""
    from speedk.distillation.recipe import parse_overrides

    values: dict[str, list[Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if key in values:
            raise ConfigError(f"{key} is given twice: say all its values at once, as in {key}=a,b")
        texts = text.split(",")
        if not equals or not all(texts):
            raise ConfigError(f"{pair!r} is not key=a,b,c")
        values[key] = [parse_overrides([f"{key}={one}"])[key] for one in texts]
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{pair!r} has a value twice")
    if not any(len(found) > 1 for found in values.values()):
        raise ConfigError("give a field and the values it shall take, as in k=24,48,96")
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def _evaluation(args: argparse.Namespace) -> Evaluation:
    from speedk.evaluation.cell import Evaluation

    names = tuple(_testing.networks(args.networks))
    if not names or args.runs < 1:
        raise ConfigError(f"there is nothing to run: --networks {args.networks}, --runs {args.runs}")
    return Evaluation(names, args.runs, args.protocol, args.epochs, precision=args.precision)


def _plans(args: argparse.Namespace, grid: list[dict[str, Any]]) -> list[Plan]:
    """A plan for each cell. Raises ConfigError, before anything runs, where one cannot be."""
    from speedk import data
    from speedk.distillation import plan as plans

    varied, made = _varied(grid), []
    load = functools.cache(data.load)  # the cells share their data
    for fields in grid:
        out = (args.out or Path("runs") / "sweep") / (_short({name: fields[name] for name in varied}))
        try:
            planned = plans.plan(args.dataset, data=args.data, ipc=args.ipc, method=args.method,
                                 objective=args.objective, recipe=args.recipe, out=out, seed=args.seed,
                                 device=args.device, steps=args.steps, network=args.network, overrides=fields,
                                 progress=True, load=load)
        except ConfigError as error:
            cell = _short(fields)
            raise ConfigError(str(error) if str(error).startswith(cell) else f"{cell}: {error}") from None
        if args.out is None:  # named after the run, which is known now
            run = "-".join([f"sweep-{planned.recipe.about.name}", planned.recipe.objective_name, *varied,
                            *_fixed(args, fields, varied, planned.recipe.about.name)])
            planned = dataclasses.replace(planned, out=Path("runs") / flat(run) / out.name)
        made.append(_within(planned))
    return made


def _fixed(args: argparse.Namespace, fields: dict[str, Any], varied: list[str], recipe: str) -> list[str]:
    """What was said and is the same in all cells, as key=value, without what the recipe's name says, and the budget:
    see `_within`."""
    options = {name: getattr(args, name) for name in ("ipc", "seed", "steps", "network")}
    said = {name: value for name, value in options.items() if value is not None} | fields
    told = (*varied, "budget", "data.budget", *(["ipc"] if f"-ipc{args.ipc}-" in recipe else []))
    return [f"{name}={said[name]}" for name in sorted(said) if name not in told]


def _within(planned: Plan) -> Plan:
    """`planned` with the budget off only where the cell exceeds it, so that a grid can be extended by cells that do.

    A cell that fits is the same with either; one that was begun keeps what its folder says.
    """
    from speedk.distillation import recipe as recipes
    from speedk.distillation import runfiles

    recipe = planned.recipe
    spent = recipe.budget(planned.real.geometry)
    if spent.counted > spent.allowed:
        return planned
    begun = {}
    with contextlib.suppress(ConfigError):  # none yet, or one that is no recipe, which the run itself refuses
        begun = recipes.read(planned.out / runfiles.RECIPE).get("data", {})
    budget = "off" if begun.get("budget") == "off" else "on"
    return dataclasses.replace(planned, recipe=dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, budget=budget)))


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The cells of a sweep.jsonl, with all that `_time` reads of them. Raises DataError, one line."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        first = lines[0]["fields"]
        for line in lines:
            line["fields"].items(), line["device"] + "", line["steps"] + 0, line["distil_seconds"] + 0.0
            for result in line["results"]:
                result["network"] + "", (result["mean"] or 0.0) + (result["std"] or 0.0)
            if line["fields"].keys() != first.keys():
                raise ValueError
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise DataError(f"{path} is not the {SWEEP} of a sweep") from None
    return lines


def _steps(names: list[str]) -> list[str]:
    """Those of the fields `names` that are the number of outer iterations."""
    return [name for name in names if name.rpartition(".")[2] == "steps"]


def _varied(grid: list[dict[str, Any]]) -> list[str]:
    return [name for name in grid[0] if any(fields[name] != grid[0][name] for fields in grid)]


def _short(fields: dict[str, Any]) -> str:
    return flat(",".join(f"{name}={value}" for name, value in fields.items()))


def _listing(plans: list[Plan], grid: list[dict[str, Any]], how: Evaluation) -> str:
    from speedk.text import table

    first, varied = plans[0], _varied(grid)
    fixed = _short({name: value for name, value in grid[0].items() if name not in varied})
    rows = [("cell", "counted", "budget", "")]
    for made, fields in zip(plans, grid, strict=True):
        spent = made.recipe.budget(made.real.geometry)
        rows.append((_short({name: fields[name] for name in varied}), f"{spent.counted:,.0f}", f"{spent.allowed:,}",
                     "over" if spent.counted > spent.allowed else ""))
    facts = [("grid", f"{len(plans)} cells of {first.recipe.about.name}" + (f" with {fixed}" if fixed else "")),
             ("data", f"{first.real.name}, split {first.real.split}"
                      + (f"; {first.real.note}" if first.real.note else "")),
             ("objective", first.chosen),
             ("tested by", f"{how.runs} of {', '.join(how.networks)}, protocol {how.protocol}"
                           + (f" in {how.precision}" if how.precision != "float32" else "")),
             ("device", str(first.device)), ("out", str(first.out.parent))]
    return f"{table(facts)}\n\n{table(rows, numbers=(1, 2))}"


def _table(lines: list[dict[str, Any]], varied: list[str]) -> str:
    from speedk.text import mean_std, table

    names = [result["network"] for result in lines[0]["results"]]
    rows = [["cell", "N/c", "counted", "of budget", *names]]
    for line in lines:
        accuracies = [mean_std(r["mean"], r["std"], len(r["accuracies"])) for r in line["results"]]
        rows.append([_short({name: line["fields"][name] for name in varied}), str(line["images_per_class"]),
                     f"{line['numbers']:,}", f"{line['numbers'] / line['budget']:.0%}", *accuracies])
    return table(rows, numbers=range(1, len(rows[0])))


def _picture(lines: list[dict[str, Any]], varied: list[str], first: Plan) -> bytes:
    """A curve for each network and each choice of the fields that are words; a point is named by the numbers. Where the
    storage is always the same and one number varies, that number is the axis."""
    from speedk.evaluation import plots

    words = [name for name in varied if isinstance(lines[0]["fields"][name], str)]
    figures = [name for name in varied if name not in words]
    by_value = len({line["numbers"] for line in lines}) == 1 and len(figures) == 1
    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for line in lines:
        curve, label = (_short({name: line["fields"][name] for name in names}) for names in (words, figures))
        x = line["fields"][figures[0]] if by_value else line["numbers"]
        for result in line["results"]:
            if result["mean"] is not None:
                name = f"{result['network']}, {curve}" if curve else result["network"]
                points.setdefault(name, []).append((x, result["mean"], result["std"], "" if by_value else label))
    if not points:
        raise ConfigError("every run failed: there is nothing to draw")
    title = f"{first.recipe.about.name}, {first.recipe.objective_name}"
    return plots.against(points, figures[0] if by_value else "counted float32 numbers", title)


def _time(sweeps: dict[str, list[dict[str, Any]]], first: Plan) -> bytes:
    """Accuracy against the seconds of distilling (the paper's Figure II, right): a curve for each sweep, network and
    choice of the other fields, a point for each number of steps."""
    from speedk.evaluation import plots

    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for sweep, lines in sweeps.items():
        varied = _varied([line["fields"] for line in lines])
        others = [name for name in varied if name not in _steps(varied)]
        for line in lines:
            curve = _short({name: line["fields"][name] for name in others})
            for result in line["results"]:
                if result["mean"] is not None:
                    name = ", ".join(part for part in (sweep, result["network"], curve) if part)
                    points.setdefault(name, []).append(
                        (line["distil_seconds"], result["mean"], result["std"], f"{line['steps']:,}"))
    if not points:
        raise ConfigError("every run failed: there is nothing to draw")
    devices = " and ".join(sorted({line["device"] for lines in sweeps.values() for line in lines}))
    title = f"{first.real.name}, IPC {first.recipe.data.ipc}, {first.recipe.objective_name}"
    return plots.against(points, f"seconds of distilling on {devices}; points: steps", title)
