"""What the commands that train and test networks ask for alike: networks, a device, a file and its data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedk.errors import ConfigError

if TYPE_CHECKING:
    from speedk.data import RealData


def networks(text: str) -> list[str]:
    """The names in "A,B", each of which is a network."""
    from speedk.networks import given

    return [given(name.strip()) for name in text.split(",") if name.strip()]


def device(name: str) -> str:
    """The device that --device asks for."""
    from speedk.distillation import plan

    return plan.chosen_device(name).type


def source(file: Path | None, args: argparse.Namespace) -> tuple[Any, RealData]:
    """What `file` is (None without one), and the data to test on: what --dataset, --data and --split say, or what the
    file says that it came from. A folder, like a file of other code, does not say."""
    from speedk import data
    from speedk.distillation import artifact
    from speedk.evaluation.evaluate import FOREIGN, load_data

    if file is None or file.is_dir() or file.suffix.lower() in FOREIGN:
        if args.dataset is None and args.data is None:
            raise ConfigError(f"{file} does not say what to test on: give --dataset NAME, --data DIR, or both")
        return file, data.load(args.dataset, args.data, split=args.split)
    distilled = artifact.load(file)
    if args.dataset is None and args.split is None:
        return distilled, load_data(distilled.header, args.data)
    name = args.dataset or distilled.header["data"].get("name")
    return distilled, data.load(name, args.data, split=args.split, resolution=distilled.geometry.resolution,
                                normaliser=distilled.header["normaliser"].get("kind"))
