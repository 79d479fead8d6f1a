"""Options that several commands have alike. Nothing here imports what is heavy: `--help` answers at once."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from speedk.errors import ConfigError
from speedk.files import check_writable
from speedk.precision import PRECISIONS
from speedk.registry import listed
from speedk.schedule import PROTOCOLS, STANDARDISATIONS


def plugins(folder: str) -> str:
    """The plug-ins of `folder`, as in "a, b or c"."""
    *most, last = listed(folder)
    return f"{', '.join(most)} or {last}" if most else last


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", metavar="NAME",
                        help=f"{plugins('speedk.distillation.parameterizations')} (default: speed)")


def add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", metavar="NAME", help=f"the student: {plugins('speedk.networks')}, or a class of "
                        "your own as my.module:Net (default: the recipe's, or convnet)")


def add_test_data(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data and --split of what a distilled file is tested on, as `_testing.source` reads them."""
    parser.add_argument("--dataset", metavar="NAME", help="the data to test on (default: what the file came from)")
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="the folder with that data, or one with a folder of its name")
    add_split(parser)


def add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("fastai", "ilsvrc"), help="of imagenette and imagewoof")


def add_evaluation(parser: argparse.ArgumentParser, protocol: str) -> None:
    """How networks are trained and tested, with the default `protocol`."""
    parser.add_argument("--runs", metavar="N", type=int, default=5, help="fresh networks of each kind (default: 5)")
    parser.add_argument("--protocol", choices=(*PROTOCOLS,), default=protocol,
                        help=f"epochs: {', '.join(f'{of.epochs:,} ({name})' for name, of in PROTOCOLS.items())}; "
                        f"default: {protocol}")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the networks' "
                        "convolutions and matrix products; bf16 is faster and not the published protocol (default: "
                        "float32)")


def check_minutes(option: str, minutes: float | None) -> None:
    """Raise ConfigError unless the time that `option` gives is some."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"{option} {minutes:g} must be above 0 minutes" if not minutes > 0 else
                          f"{option} inf is no limit: leave it out")


def add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", metavar="A,B", default="convnet", help="that are trained and tested: "
                        f"{plugins('speedk.networks')}, or a class of your own as my.module:Net (default: convnet)")


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """What takes the place of a part of the protocol, and the seed."""
    parser.add_argument("--standardisation", choices=STANDARDISATIONS, help="speed: every batch by its own mean and "
                        "deviation, in testing too; mtt: not (default: the file's own, else mtt)")
    parser.add_argument("--rate", metavar="R", type=float, help="in place of the one stored in the file")
    parser.add_argument("--epochs", metavar="N", type=int, help="in place of the protocol's")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="run r has the seed S + r (default: 0)")


def check_report(out: Path | None) -> None:
    """Raise a SpeedkError where the report `out` could not be written in the end."""
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {out.parent} is not a folder, create it first")
    if out is not None:
        check_writable(out)
