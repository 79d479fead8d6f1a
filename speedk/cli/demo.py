"""speedk demo: the whole walk on the embedded digits, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli import _options
from speedk.distillation import runfiles
from speedk.errors import ConfigError
from speedk.text import mean_std, table

if TYPE_CHECKING:
    from speedk.evaluation import Report

HELP = "Distil the embedded digits, evaluate the saved file beside its baselines, and draw it: a few minutes on a CPU."
EPILOG = """\
example:
  speedk demo --out runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the runs go (default: a new folder under runs/)")
    parser.add_argument("--runs", metavar="N", type=int, default=5, help="networks trained for each row (default: 5)")
    _options.add_device(parser)
    parser.add_argument("--steps", metavar="N", type=int, help="outer iterations (default: the recipe's)")


def run(args: argparse.Namespace) -> int:
    from speedk import evaluate
    from speedk.cli._progress import Bars
    from speedk.distillation import plan as plans
    from speedk.evaluation import real_images, whole

    if args.runs < 1:
        raise ConfigError(f"--runs {args.runs} must be at least 1")
    began = time.monotonic()
    out = args.out or _unused(Path("runs"))
    made = {method: plans.plan("digits", ipc=1, method=method, out=out / method, device=args.device, steps=args.steps)
            for method in ("speed", "pixels")}
    real, device = made["speed"].real, str(made["speed"].device)
    print(f"{real.name}: {len(real.train):,} training and {len(real.test):,} test images, split {real.split}; "
          f"{real.note}\nobjective {made['speed'].chosen}\n")
    files, seconds = {}, {}
    for method, plan in made.items():
        print(f"distilling {method}: {plan.recipe.objective.steps:,} steps", flush=True)
        bars, start = Bars(), time.monotonic()
        try:
            files[method] = plan.run(progress=bars.progress())
        finally:
            bars.close()
        seconds[method] = time.monotonic() - start
    reports = {}
    sources = {"SPEED": files["speed"], "pixels, same storage": files["pixels"],
               "one real image a class": real_images(real), "whole data set": whole(real)}
    for name, source in sources.items():
        runs = 1 if name == "whole data set" else args.runs
        print(f"evaluating: {name}", flush=True)
        beside = source.with_name(runfiles.EVALUATION) if isinstance(source, Path) else None
        reports[name] = evaluate(source, real, networks=("convnet",), runs=runs, protocol="quick", device=device,
                                 out=beside)
    print(f"\n{_table(reports)}\n")
    speed = reports["SPEED"]
    print(f"accuracy, per cent of {len(real.test):,} test images ({real.split}; {real.note}); ConvNet, protocol "
          f"{speed.protocol['name']} ({speed.protocol['epochs']} epochs), the whole data set "
          f"{reports['whole data set'].protocol['epochs']} epochs; seeds from 0")
    print(f"distilled in {seconds['speed']:.0f} s (pixels {seconds['pixels']:.0f} s), "
          f"{time.monotonic() - began:.0f} s in all")
    print(f"artifact {files['speed']}: {files['speed'].stat().st_size:,} bytes")
    print(f"picture  {files['speed'].with_name(runfiles.PREVIEW)}")
    return 0


def _table(reports: dict[str, Report]) -> str:
    """A row for each of what was trained on."""
    rows = [("trained on", "images", "float32 numbers", "accuracy", "runs")]
    for name, report in reports.items():
        result, numbers = report.results[0], sum(report.storage.values())
        accuracy = mean_std(result.mean, result.std, len(result.seeds), digits=1)
        rows.append((name, f"{report.images:,}", f"{numbers:,.0f}", accuracy, str(len(result.seeds))))
    return table(rows, numbers=(1, 2, 4))


def _unused(folder: Path) -> Path:
    """folder/demo, or the first of demo-2, demo-3, ... that is not there yet."""
    number, path = 1, folder / "demo"
    while path.exists():
        number += 1
        path = folder / f"demo-{number}"
    return path
