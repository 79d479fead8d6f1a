"""speedk info: what a distilled file holds and where it comes from."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from typing import TYPE_CHECKING, Any

from speedk.cli._files import distilled_file
from speedk.errors import one_line
from speedk.text import table

if TYPE_CHECKING:
    from speedk.distillation.artifact import Distilled

HELP = "Print what a distilled file holds: its making, its counted numbers, its bytes."
_WIDTH = 88
EPILOG = """examples:
  speedk info runs/digits/distilled.safetensors
  speedk info distilled.safetensors --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a distilled file (.safetensors), or the run directory it is in")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON document")


def run(args: argparse.Namespace) -> int:
    from speedk.distillation import artifact

    distilled = artifact.load(distilled_file(args.file))
    summary = summarise(distilled)
    print(json.dumps({**distilled.header, **summary}, indent=1) if args.json else text(distilled, summary))
    return 0


def summarise(distilled: Distilled) -> dict[str, Any]:
    """What follows from the file: the parts it stores and how full its budget is."""
    header = distilled.header
    parts = [{"part": name, "numbers": numbers, "bytes": size} for name, numbers, size in distilled.storage()]
    stored = sum(part["bytes"] for part in parts)
    return {
        "images": len(distilled),
        "storage": parts,
        "tensor_bytes": stored,
        "bytes_per_class": stored / distilled.geometry.classes,
        "file_bytes": os.path.getsize(distilled.path),
        "budget_used": header["numbers"] / header["budget"],
    }


def text(distilled: Distilled, summary: dict[str, Any]) -> str:
    """The page that is printed."""
    header, g = distilled.header, distilled.geometry
    counts = sorted(set(header["images_per_class"]))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    data = header["data"]
    facts = [
        ("file", one_line(distilled.path)),
        ("method", f"{distilled.method}: {_fields(header['spec'])}"),
        ("recipe", _fields(header["recipe"].get("recipe", header["recipe"]))),
        ("images", f"{summary['images']:,} of {g.shape} in {g.classes} classes, {each} a class, in the storage of "
                   f"{distilled.ipc}"),
        ("classes", _list(distilled.class_names)),
        ("data", f"{one_line(data['name'])}, split {one_line(data['split'])}"),
        ("", one_line(data["note"])),
        ("data hash", one_line(data["fingerprint"])),
        ("normaliser", _fields(header["normaliser"])),
        ("objective", _fields(header["objective"])),
        ("", one_line(header["chosen"])),
        ("protocol", one_line(header["protocol"])),
        ("seed", str(header["seed"])),
        ("checksum", distilled.fingerprint),
    ]
    rows = [(name if first else "", part) for name, fact in facts if fact
            for first, part in zip((True, *[False] * len(fact)), textwrap.wrap(fact, _WIDTH), strict=False)]
    return table(rows) + "\n\n" + _counts(distilled, summary)


def _counts(distilled: Distilled, summary: dict[str, Any]) -> str:
    header = distilled.header
    stored, file = summary["tensor_bytes"], summary["file_bytes"]
    full = f"{summary['budget_used']:.1%} full" + (", and switched off" if header["budget_off"] else "")
    rows = [("stored", "float32 numbers", "bytes", "")]
    rows += [(part["part"], _number(part["numbers"]), f"{part['bytes']:,}", f"{part['bytes'] / stored:.1%}")
             for part in summary["storage"] if part["part"] != "labels"]
    rows += [("counted", _number(header["numbers"]), f"{int(4 * header['numbers']):,}", ""),
             ("budget", _number(header["budget"]), f"{4 * header['budget']:,}", full)]
    if header["label_numbers"]:
        rows.append(("learned labels", _number(header["label_numbers"]), f"{int(4 * header['label_numbers']):,}",
                     "on top of the budget"))
    rows += [("a class", _number(stored / 4 / distilled.geometry.classes), f"{summary['bytes_per_class']:,.0f}", ""),
             ("file", "", f"{file:,}", f"of which the header takes {file - stored:,}")]
    return table(rows, numbers=(1, 2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _fields(values: dict[str, Any]) -> str:
    said = {key: value for key, value in values.items() if value not in ("", None, [], {})}
    return ", ".join(f"{one_line(key, 40)} {_value(value)}" for key, value in said.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "(" + _list(value) + ")"
    if isinstance(value, dict):
        return "{" + _fields(value) + "}"
    return one_line(f"{value:.6g}" if isinstance(value, float) else value)


def _list(values: list[Any]) -> str:
    shown = ", ".join(_value(value) for value in values[:12])
    return shown + (f", ... ({len(values)} in all)" if len(values) > 12 else "")
