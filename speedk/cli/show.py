"""speedk show: a distilled file as one picture, a row per class."""

from __future__ import annotations

import argparse
from pathlib import Path

from speedk.errors import ConfigError
from speedk.registry import nearest

HELP = "Draw the images of a distilled file as a grid, a row per class, in a PNG file."
EPILOG = """examples:
  speedk show distilled.safetensors
  speedk show distilled.safetensors --out cats.png --classes cat dog --columns 20
"""
LOWER = "draw fewer --columns or --classes"

_MAX_PIXELS = 100_000_000  # what Pillow itself, and most viewers, still open without a warning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a distilled file (.safetensors)")
    parser.add_argument("--out", metavar="PNG", type=Path, help="default: the file's own name, ending in .png")
    parser.add_argument("--columns", metavar="N", type=int, default=10, help="images of a class, at most (default: 10)")
    parser.add_argument("--classes", metavar="NAME", nargs="+", help="names of the classes to draw (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace the PNG file if there is one")


def run(args: argparse.Namespace) -> int:
    import torch

    from speedk import pictures
    from speedk.distillation import artifact
    from speedk.files import write_atomic

    if args.columns < 1:
        raise ConfigError(f"--columns {args.columns} must be at least 1")
    out = args.out or Path(args.file).with_suffix(".png")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists: say --overwrite, or choose another --out")
    distilled = artifact.load(args.file)
    labels = _labels(args.classes, distilled.class_names)
    rows = [(distilled.classes == label).nonzero()[:args.columns, 0] for label in labels]
    drawn = max(map(len, rows)) * len(rows) * max(64, distilled.geometry.resolution) ** 2
    if drawn > _MAX_PIXELS:
        raise ConfigError(f"a grid of {len(rows)} classes by {max(map(len, rows))} images would have {drawn:,} pixels: "
                          "draw fewer --classes or --columns")
    images = distilled.images("unit", torch.cat(rows)).split([len(row) for row in rows])
    write_atomic(out, pictures.grid(images, [distilled.class_names[label] for label in labels]))
    shown, each = sum(map(len, rows)), distilled.header["images_per_class"]
    print(f"{out}: {shown:,} of {len(distilled):,} images, {len(rows)} of {len(each)} classes, a row each")
    return 0


def _labels(wanted: list[str] | None, names: list[str]) -> list[int]:
    """The labels of the `wanted` names, or all of them."""
    for name in wanted or ():
        if name not in names:
            hint = nearest(name, names) or f"; there are {', '.join(names[:20])}"
            raise ConfigError(f"there is no class {name!r}{hint}")
    return list(range(len(names))) if wanted is None else [names.index(name) for name in wanted]
