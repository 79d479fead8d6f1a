"""speedk show: a distilled file as one picture, a row per class."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from speedk.cli._files import distilled_file
from speedk.errors import ConfigError
from speedk.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from speedk.distillation.artifact import Distilled

HELP = "Draw the images of a distilled file as a grid, a row per class, in a PNG file."
EPILOG = """examples:
  speedk show distilled.safetensors
  speedk show distilled.safetensors --out cats.png --classes cat dog --columns 20
  speedk show distilled.safetensors --density
  speedk show runs/digits --sparsification --columns 4
"""
LOWER = "draw fewer --columns or --classes"

_MAX_PIXELS = 100_000_000  # what Pillow itself, and most viewers, still open without a warning

Rows = list[tuple[str, "Tensor"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a distilled file (.safetensors), or the run directory it is in")
    also = parser.add_mutually_exclusive_group()
    also.add_argument("--density", action="store_true",
                      help="below the images how many entries of their codes each patch has (SPEED)")
    also.add_argument("--sparsification", action="store_true",
                      help="each image before and after its code was made sparse (SPEED; needs the run's checkpoints)")
    parser.add_argument("--out", metavar="PNG", type=Path, help="default: the file's own name, ending in .png")
    parser.add_argument("--columns", metavar="N", type=int, default=10, help="images of a class, at most (default: 10)")
    parser.add_argument("--classes", metavar="NAME", nargs="+", help="names of the classes to draw (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace the PNG file if there is one")


def run(args: argparse.Namespace) -> int:
    from speedk import pictures
    from speedk.distillation import artifact
    from speedk.files import write_atomic

    if args.columns < 1:
        raise ConfigError(f"--columns {args.columns} must be at least 1")
    path = distilled_file(args.file)
    kind = "density" if args.density else "sparsification" if args.sparsification else ""
    out = args.out or path.with_name(f"{path.stem}-{kind}.png" if kind else f"{path.stem}.png")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists: say --overwrite, or choose another --out")
    distilled = artifact.load(path)
    labels = _labels(args.classes, distilled.class_names)
    names = [distilled.class_names[label] for label in labels]
    places = [(distilled.classes == label).nonzero()[:args.columns, 0] for label in labels]
    widest = max(map(len, places))
    drawn = widest * len(places) * (2 if kind else 1) * max(64, distilled.geometry.resolution) ** 2
    if drawn > _MAX_PIXELS:
        raise ConfigError(f"a grid of {len(places)} classes by {widest} images would have {drawn:,} pixels: "
                          "draw fewer --classes or --columns")
    how = {"density": _density, "sparsification": _sparsification}.get(kind, _images)
    rows, said = how(distilled, names, places)
    write_atomic(out, pictures.grid([images for _, images in rows], [name for name, _ in rows]))
    shown, each = sum(map(len, places)), distilled.header["images_per_class"]
    rows_each = "two rows" if kind else "a row"
    print(f"{out}: {shown:,} of {len(distilled):,} images, {len(places)} of {len(each)} classes, {rows_each} each")
    print("".join(f"{line}\n" for line in said), end="")
    return 0


def _labels(wanted: list[str] | None, names: list[str]) -> list[int]:
    """The labels of the `wanted` names, or all of them."""
    for name in wanted or ():
        if name not in names:
            hint = nearest(name, names) or f"; there are {', '.join(names[:20])}"
            raise ConfigError(f"there is no class {name!r}{hint}")
    return list(range(len(names))) if wanted is None else [names.index(name) for name in wanted]


def _unit(distilled: Distilled, places: list[Tensor]) -> list[Tensor]:
    import torch

    return list(distilled.images("unit", torch.cat(places)).split([len(row) for row in places]))


def _images(distilled: Distilled, names: list[str], places: list[Tensor]) -> tuple[Rows, list[str]]:
    return list(zip(names, _unit(distilled, places), strict=True)), []


def _density(distilled: Distilled, names: list[str], places: list[Tensor]) -> tuple[Rows, list[str]]:
    """The paper's Figure III: where the entries of the codes lie. Above the classes stand the scale and the mean of all
    images, which has a scale of its own."""
    import torch

    from speedk import pictures

    counts = distilled.synthetic.density(torch.arange(len(distilled)))
    if counts is None:
        raise ConfigError(f"{distilled.path} holds {distilled.method}, whose images have no codes: --density is for "
                          "SPEED")
    side, mean = distilled.geometry.resolution, counts.double().mean(0, keepdim=True)
    top, most = int(counts.max()), float(mean.max())
    scale = (torch.arange(side) * (top + 1) // side).expand(1, side, side)
    rows = [(f"entries, 0 to {top}", pictures.heat(scale, top, side)),
            (f"mean, {float(mean.min()):.1f} to {most:.1f}", pictures.heat(mean, most, side))]
    for name, images, place in zip(names, _unit(distilled, places), places, strict=True):
        rows += [(name, images), ("", pictures.heat(counts[place], top, side))]
    return rows, [f"a patch has {float(mean.mean()):.2f} entries on average, {int(counts.min())} to {top}; "
                  f"{float((counts == 0).double().mean()):.1%} of the patches of all images have none and are grey"]


def _sparsification(distilled: Distilled, names: list[str], places: list[Tensor]) -> tuple[Rows, list[str]]:
    """The paper's Figure 4: images of whole codes, and below them those that the file holds."""
    from speedk.distillation.dense import dense

    whole = dense(distilled)
    before, after = _unit(whole, places), _unit(distilled, places)
    rows = [(f"{when}{name}", images) for name, *pair in zip(names, before, after, strict=True)
            for when, images in zip(("before: ", "after: "), pair, strict=True)]
    change = sum(float((a - b).abs().sum()) for a, b in zip(before, after)) / sum(a.numel() for a in before)
    kept, *notes = distilled.synthetic.left_out(whole.synthetic)
    return rows, [f"{kept}; brightness changes by {change:.4f} on average (of 0 to 1)", *notes]
