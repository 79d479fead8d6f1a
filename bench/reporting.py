"""The report of a session: the table on the terminal, and with --save a JSON file and a page of the same."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from pathlib import Path

import torch
from floors import verdicts
from measuring import CUDA, roofs


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's CPU, or its architecture where the system does not say."""
    found = re.search(r"^model name\s*: *(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


DEVICE_NAME = torch.cuda.get_device_name() if CUDA else f"{processor()}, {torch.get_num_threads()} threads"
LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of other work: before any of ours
TITLES = ["op", "case", "", "ms", "GB/s", "GFLOP/s", "% roof", "x best peer", "peak MB"]


def roofs_in_words() -> str:
    roof = roofs()
    products = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in roof.items()
                         if name not in ("copy", "fill"))  # fmt: skip
    moves = f"copy {roof['copy'] / 1e9:.1f} GB/s, fill {roof['fill'] / 1e9:.1f} GB/s"
    return f"{moves}, the library's best product {products}"


def table(rows: list[dict]) -> list[list[str]]:
    """The results as text, a row each, under a row of titles; what repeats from the row above is left out. A peer that
    could not take part has its reason there."""
    lines, last = [TITLES], None
    for row in rows:
        case = row["case"] if row["precision"] == "float32" else f"{row['case']}, {row['precision']}"
        head = [row["op"], case] if [row["op"], case] != last else ["", ""]
        last = [row["op"], case]
        if row.get("absent"):
            lines.append([*head, f" {row['who']}: {row['absent']}", *[""] * (len(TITLES) - 3)])
            continue
        rates = [f"{row['gigabytes_per_second']:.1f}" if row["gigabytes_per_second"] else "",
                 f"{row['gigaflops']:.0f}" if row["gigaflops"] else ""]
        lines.append([*head, ("*" if row["ours"] else " ") + row["who"], f"{row['milliseconds']:.{2 + CUDA}f}", *rates,
                      f"{100 * row['of_roof']:.0f}" if row["of_roof"] else "",
                      "" if row["times_best_peer"] is None else f"{row['times_best_peer']:.2f}",
                      "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"])  # fmt: skip
    return lines


def floors_table(rows: list[dict]) -> list[list[str]]:
    lines = [["op", "case", "", "asked", "measured", "met"]]
    for v in verdicts(rows, "cuda" if CUDA else "cpu"):
        case = v["case"] if v["precision"] == "float32" and not CUDA else f"{v['case']}, {v['precision']}"
        met = {True: "yes", False: "no", None: ""}[v["met"]]
        lines.append([v["op"], case, v["who"], v["asked_in_words"], v["measured_in_words"], met])
    return lines


def aligned(lines: list[list[str]], left: int) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths))) for line in lines]  # fmt: skip


def file_name(device: str) -> str:
    """What its reports are called: its words, without trademarks."""
    return "-".join(re.findall("[a-z0-9]+", re.sub(r"\((r|tm|c)\)", " ", device.lower())))


def save(rows: list[dict], missing: list[str], folder: Path) -> None:
    """Write what there is so far to `folder`, under the device's name; `missing`: what failed or was left out, and
    why."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(DEVICE_NAME)
    today = time.strftime("%Y-%m-%d")
    report = {"device": DEVICE_NAME, "torch": torch.__version__, "date": today, "load_before": LOAD_BEFORE,
              "roofs": roofs(), "rows": rows, "floors": verdicts(rows, "cuda" if CUDA else "cpu"), "missing": missing}
    _replace(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    timing = ("Times are the GPU's own, with cold caches and launches queued ahead, but for calls of over 20 ms, whose "
              "launches are part of their time." if CUDA else "Times are the best of several calls.")  # fmt: skip
    page = (f"# {DEVICE_NAME}\n\n`pytest bench/` on {today}, PyTorch {torch.__version__}. {roofs_in_words()}.\n"
            f"Ours are marked *; the ratio is the best peer's time over this one's. {timing} The roof is the greater "
            "of bytes to move at the rate of a copy, and FLOP at the rate of the library's best product here, which is "
            "no bound: kernels that fit the shape better go beyond 100%. `fill` is `torch.zeros` of the same tensor, "
            f"in the same run.\n\n{_page(table(rows), 3)}\n## Floors\n\n{_page(floors_table(rows), 6)}")
    if missing:
        page += "\n## Not measured\n\n" + "".join(f"- {line}\n" for line in missing)
    _replace(folder / f"{name}.md", page)


def _page(lines: list[list[str]], left: int) -> str:
    rule = ["---"] * left + ["--:"] * (len(lines[0]) - left)
    return "".join("| " + " | ".join(cell.replace("*", "\\*") for cell in line) + " |\n"
                   for line in (lines[0], rule, *lines[1:]))  # fmt: skip


def _replace(path: Path, text: str) -> None:
    """A session that is killed leaves the report before it, whole."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)
