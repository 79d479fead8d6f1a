"""speedk evaluate: train networks on a distilled file and test them on the real test set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.cli import _curves, _options, _testing
from speedk.cli._files import distilled_file
from speedk.distillation import runfiles
from speedk.errors import ConfigError, TrainingError
from speedk.files import write_atomic
from speedk.schedule import PROTOCOLS, WHOLE

if TYPE_CHECKING:
    from speedk.evaluation import Report

Curves = dict[str, dict[str, float]]
"""Of one report: network -> corruption -> mean accuracy."""

HELP = "Train networks on a distilled file (or on real images) and test them on the real test set."
_EPOCHS = "\n".join(f"  {name:<7} {of.epochs:,} epochs" for name, of in PROTOCOLS.items())
EPILOG = f"""\
protocols: batch 256, SGD at the rate stored in the file (else 0.01), momentum 0.9, weight decay 5e-4, DSA;
after half of the epochs and one more, a tenth of the rate and a fresh optimiser; accuracy after the last epoch
{_EPOCHS}
  --whole {WHOLE.epochs} epochs at {WHOLE.rate:g}

examples:
  speedk evaluate runs/digits/distilled.safetensors --protocol quick
  speedk evaluate runs/cifar10/distilled.safetensors --data DIR --networks convnet,mlp
  speedk evaluate runs/digits/distilled.safetensors --protocol quick --corruptions
  speedk evaluate --dataset digits --real --protocol quick
  speedk evaluate --dataset digits --whole --runs 1
"""
LOWER = "evaluate fewer runs or networks at a time (--runs, --networks)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path,
                        help="a distilled file or its run directory, or images and labels as .npz or .parquet")
    _options.add_test_data(parser)
    _options.add_networks(parser)
    _options.add_evaluation(parser, "paper")
    _options.add_schedule(parser)
    _options.add_device(parser)
    parser.add_argument("--whole", action="store_true", help="train on the whole data set instead: the upper bound")
    parser.add_argument("--real", metavar="N", nargs="?", const=1, type=int,
                        help="train on N real images per class instead (default: 1), drawn anew for each run")
    parser.add_argument("--other-data", action="store_true",
                        help="test a file on data that it was not distilled from")
    parser.add_argument("--corruptions", metavar="DIR", nargs="?", const=True,
                        help="test on corrupted images too: 15 kinds at 5 severities, made from the test set, or read "
                        "from DIR (CIFAR-10-C, CIFAR-100-C); draws corruptions.png beside the report")
    parser.add_argument("--compare", metavar="JSON", nargs="+", type=Path, default=[],
                        help="with --corruptions: earlier reports whose curves are drawn too")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="the report as JSON (default: evaluation.json beside FILE; one that is there already "
                        "becomes evaluation.1.json)")


def run(args: argparse.Namespace) -> int:
    if (args.file is not None) + args.whole + (args.real is not None) != 1:
        taken = args.corruptions if isinstance(args.corruptions, str) else ""
        raise ConfigError("give one of FILE, --whole and --real" + (taken and f"; --corruptions took {taken}: put FILE "
                                                                    "before it"))
    names = _testing.networks(args.networks)
    _check(args, names)
    from speedk.evaluation import evaluate, real_images, whole

    file = None if args.file is None else distilled_file(args.file)
    if file is not None and file.is_dir():
        raise ConfigError(f"{file} is a folder without a {runfiles.DISTILLED}: give a file or a run directory")
    out = args.out
    if out is None and file is not None and file.exists():
        out = file.with_name(runfiles.EVALUATION)
        _options.check_report(out)
    source, real = _testing.source(file, args)
    if args.whole:
        source = whole(real)
    elif args.real is not None:
        source = real_images(real, args.real)
    beside = _curves.reports(args.compare, _corruptions)
    report = evaluate(source, real, networks=names, runs=args.runs, protocol=args.protocol, seed=args.seed,
                      standardisation=args.standardisation, rate=args.rate, epochs=args.epochs,
                      precision=args.precision, device=_testing.device(args.device), other_data=args.other_data,
                      corruptions=args.corruptions or False)
    conclude(report, out, keep=args.out is None, beside=beside)
    return 0


def conclude(report: Report, out: Path | None, keep: bool = True, beside: Sequence[tuple[str, Curves]] = ()) -> None:
    """Print a report and write it to `out`, and a picture of its corruptions, if it has them, with those of the reports
    `beside`; earlier ones there are kept if `keep`. Raises TrainingError for failed runs."""
    print(report)
    if out is not None:
        picture = out.with_name("corruptions.png") if keep else out.with_suffix(".png")
        if keep:
            _curves.keep(out)
        write_atomic(out, report.to_json().encode())
        print(f"\n{out}")
        if report.robustness and not report.failed:
            if keep:
                _curves.keep(picture)
            _curves.draw(picture, lambda: _polar([*beside, (report.source, _corruptions(report.to_dict()))]))
    if report.failed:
        count = sum(len(result.failures) for result in report.results)
        raise TrainingError(f"{count} of {sum(len(r.seeds) for r in report.results)} runs failed: no mean is given for "
                            "their network; a lower --rate may help")


def _polar(found: Sequence[tuple[str, Curves]]) -> bytes:
    """Figure 3 of the paper: a panel for each network of the last report, a curve for each report that has it."""
    from speedk.evaluation import plots

    names = _curves.titles([source for source, _ in found])
    return plots.polar({network: {name: curves[network] for name, (_, curves) in zip(names, found, strict=True)
                                  if network in curves} for network in found[-1][1]})


def _corruptions(report: dict[str, Any]) -> Curves:
    """The mean accuracy of each network under each corruption."""
    from speedk.corruptions import NAMES

    return {result["network"]: {name: float(result["corruptions"][name]["mean"]) for name in NAMES}
            for result in report["corruptions"]["results"]}


def _check(args: argparse.Namespace, names: list[str]) -> None:
    """What can be refused before any data are read."""
    if args.runs < 1 or not names:
        raise ConfigError(f"there is nothing to run: --runs {args.runs}, --networks {args.networks}")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} is negative")
    _options.check_report(args.out)
    if args.compare and not args.corruptions:
        raise ConfigError("--compare draws curves of --corruptions: say that too")
    if isinstance(args.corruptions, str) and not Path(args.corruptions).is_dir():
        raise ConfigError(f"--corruptions {args.corruptions} is not a folder; to make them, put FILE before it")
    if args.file is None and args.dataset is None and args.data is None:
        raise ConfigError("say which data: --dataset NAME, --data DIR, or both")
