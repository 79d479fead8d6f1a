"""speedk continual: learn the classes of a distilled file step by step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli import _curves, _options, _testing
from speedk.cli._files import distilled_file
from speedk.errors import ConfigError, TrainingError
from speedk.files import write_atomic
from speedk.text import mean_std, table

if TYPE_CHECKING:
    from speedk.evaluation import ContinualReport

HELP = "Learn the classes in steps, a fresh network after each on all distilled so far, and draw the accuracy."
EPILOG = """\
Each run splits the classes at random by its seed, alike for all files; after each step a fresh network is trained on
the images of all classes so far and tested on the test images of all of them. A folder holds a distilled file for each
step instead, in the order of their names; it has its own split. Several FILEs are several curves.

examples:
  speedk continual runs/cifar100/distilled.safetensors --data DIR
  speedk continual runs/a/distilled.safetensors runs/b/distilled.safetensors --networks convnet,resnet18
  speedk continual per-step/ --dataset cifar100 --data DIR
"""
LOWER = "learn fewer --runs or --networks at a time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path,
                        help="a distilled file or its run directory, or a folder with a file for each step")
    parser.add_argument("--steps", metavar="N", type=int, help="default: 5, or as many as a folder has files")
    _options.add_test_data(parser)
    _options.add_networks(parser)
    _options.add_evaluation(parser, "paper")
    _options.add_schedule(parser)
    _options.add_device(parser)
    parser.add_argument("--other-data", action="store_true", help="test files on data they were not distilled from")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the report as JSON, and beside it a picture ending "
                        "in .png (default: continual.json beside the first FILE, or in it; earlier ones are kept)")


def run(args: argparse.Namespace) -> int:
    from speedk.evaluation import continual

    names = _testing.networks(args.networks)
    if args.runs < 1 or args.seed < 0:
        raise ConfigError(f"--runs {args.runs} must be at least 1 and --seed {args.seed} at least 0")
    files = [distilled_file(file) for file in args.files]
    first = files[0]
    out = args.out or (first if first.is_dir() else first.parent) / "continual.json"
    if args.out is not None or out.parent.is_dir():  # files that are not there are said when they are read
        _options.check_report(out)
    telling = [file for file in files if file.suffix.lower() == ".safetensors"]
    _, real = _testing.source([*telling, *files][0], args)
    report = continual(files, real, steps=args.steps, networks=names, runs=args.runs,
                       protocol=args.protocol, seed=args.seed, standardisation=args.standardisation, rate=args.rate,
                       epochs=args.epochs, precision=args.precision, device=_testing.device(args.device),
                       other_data=args.other_data)
    print(text(report))
    picture = out.with_suffix(".png")
    if args.out is None:
        _curves.keep(out)
        _curves.keep(picture)
    write_atomic(out, report.to_json().encode())
    print(f"\n{out}")
    if report.failed:
        count = sum(len(curve.failures) for curve in report.curves)
        raise TrainingError(f"{count} networks did not train: no mean is given for their steps; a lower --rate may "
                            "help")
    _curves.draw(picture, lambda: _picture(report))
    return 0


def text(report: ContinualReport) -> str:
    """The table that is printed: a row for each memory and network, a column for each step."""
    names = _curves.titles([memory["source"] for memory in report.memories])
    data, steps = report.data, range(len(report.classes))
    note = f", {data['note']}" if data.get("note") else ""
    facts = [("data", f"{data['name']}, split {data['split']}, {data['test']:,} test images{note}")]
    for name, memory in zip(names, report.memories, strict=True):
        facts += [(name, f"{memory['source']}: {memory['images']:,} images, "
                         f"{sum(memory['storage'].values()):,.10g} float32 numbers; {memory['split']}"),
                  ("", f"{memory['schedule']}; {memory['standardisation']}")]
    runs = " ".join(map(str, report.seeds))
    facts.append(("accuracy", f"per cent of the test images of all classes seen; seeds {runs}; {report.seconds:,.0f} s "
                              f"on {report.device}"))
    rows = [("memory", "network", *(f"{count} classes" for count in report.classes))]
    per_memory = len(report.curves) // len(names)
    for place, curve in enumerate(report.curves):
        cells = [mean_std(curve.mean(step), curve.std(step), len(report.seeds)) for step in steps]
        rows.append((names[place // per_memory], curve.network, *cells))
    lines = [table(facts), "", table(rows, numbers=[2 + step for step in steps])]
    return "\n".join(lines + [f"{curve.network}, {why}" for curve in report.curves for why in curve.failures])


def _picture(report: ContinualReport) -> bytes:
    """Figure 2 of the paper: a panel for each network, a curve for each memory."""
    from speedk.evaluation import plots

    names = _curves.titles([memory["source"] for memory in report.memories])
    per_memory = len(report.curves) // len(names)
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for place, curve in enumerate(report.curves):
        panels.setdefault(curve.network, {})[names[place // per_memory]] = [
            (count, curve.mean(step), curve.std(step)) for step, count in enumerate(report.classes)]
    return plots.curves(panels, "classes seen", "accuracy on all of them, per cent")
