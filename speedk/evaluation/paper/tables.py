"""The paper's tables: their cells, the run that each is, and the page that is made of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from speedk.errors import ConfigError, DataError
from speedk.evaluation.paper import published
from speedk.files import locked, write_atomic
from speedk.registry import nearest
from speedk.text import mean_std
from speedk.toml import tomllib

UNPUBLISHED = "unpublished"
"""Stands for the number of a row that is ours: its runs belong beside the paper's."""
WITH_SPEED = " with SPEED"
"""Ends the name of a row whose gain over the row of the rest of its name is shown."""


@dataclass(frozen=True)
class Target:
    """The run behind a cell. kind: "recipe", "coreset" or "whole"; name: of the recipe, the coreset's method, or "";
    data: the data set's name in the tables; fields: recipe fields that differ, as sorted pairs."""

    kind: str
    name: str
    data: str
    ipc: int
    objective: str = ""
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def dataset(self) -> str:
        """The data set's name in the catalogue."""
        return self.data.removesuffix("256") if self.data.startswith("imagenette") else self.data

    @property
    def folder(self) -> str:
        """A name for its run directory."""
        changed = [f"{name}={value}" for name, value in self.fields]
        parts = {"recipe": [self.name, self.objective, *changed],
                 "coreset": [f"{self.data}-ipc{self.ipc}", self.name], "whole": [self.data, "whole"]}[self.kind]
        return "-".join(parts)


@dataclass(frozen=True)
class Cell:
    """One number of a table. published: "45.0±0.4", "" where the paper has none, or UNPUBLISHED; target: None where it
    is not part of speedk."""

    table: str
    row: str
    column: str
    network: str
    published: str
    target: Target | None


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]

    def select(self, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> list[Cell]:
        """Cells that have a number and a run, of the named rows and columns (default: all), upper and lower case alike.
        Raises ConfigError for a name that there is not, and where nothing is left."""
        wanted = [self._named(rows, self.rows, "row"), self._named(columns, self.columns, "column")]
        found = [c for c in self.cells if c.row in wanted[0] and c.column in wanted[1] and c.published]
        able = [c for c in found if c.target is not None]
        if not able:
            raise ConfigError(f"table {self.name} has no number there" if not found else
                              f"{found[0].row} is another paper's method, which is not part of speedk")
        return able

    def _named(self, asked: Sequence[str], known: Sequence[str], what: str) -> list[str]:
        folded = {name.casefold(): name for name in known}
        for name in asked:
            if name.casefold() not in folded:
                raise ConfigError(f"table {self.name} has no {what} {name!r}{nearest(name, list(known))}; there are "
                                  f"{'; '.join(known)}")
        return [folded[name.casefold()] for name in asked] or list(known)


def tables() -> dict[str, Table]:
    """The paper's tables by their number."""
    text = (resources.files("speedk.evaluation.paper") / "paper.toml").read_text(encoding="utf-8")
    return {name: _table(name, found) for name, found in tomllib.loads(text).items()}


def table(name: str) -> Table:
    """That number, in upper or lower case. Raises ConfigError where there is none."""
    known = tables()
    folded = {each.casefold(): found for each, found in known.items()}
    if name.casefold() not in folded:
        raise ConfigError(f"there is no table {name!r}, only {', '.join(known)}; docs/paper.md says what makes the "
                          "figures and the other tables")
    return folded[name.casefold()]


def _table(name: str, found: Mapping[str, Any]) -> Table:
    cells = []
    for row in found["rows"]:
        numbers = row["published"].split() if "published" in row else [UNPUBLISHED] * len(found["columns"])
        for column, number in zip(found["columns"], numbers, strict=True):
            facts = {**found.get("common", {}), **column, **row,
                     "fields": {**column.get("fields", {}), **row.get("fields", {})}}
            cells.append(Cell(name, row["name"], column["name"], facts["network"], number.replace("-", ""),
                              _target(facts)))
    return Table(name, found["title"], found.get("note", ""), tuple(row["name"] for row in found["rows"]),
                 tuple(column["name"] for column in found["columns"]), tuple(cells))


def _target(facts: Mapping[str, Any]) -> Target | None:
    data, ipc = facts["data"], facts["ipc"]
    if "coreset" in facts:
        return Target("coreset", facts["coreset"], data, ipc)
    if "whole" in facts:
        return Target("whole", "", data, 0)
    if "method" in facts:
        return Target("recipe", f"{data}-ipc{ipc}-{facts['method']}", data, ipc, facts["objective"],
                      tuple(sorted(facts["fields"].items())))
    return None


def cell_line(cell: Cell, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the results file says of one cell: the table's facts, the settings of the run that a published one is known
    of, so that a recipe can change without changing what was measured, and what belongs to the cell's network, which
    may have been measured on another day than the others."""
    result = next(r for r in measured["results"] if r["network"] == cell.network)
    rest = {name: value for name, value in measured.items() if name != "results"}
    return {"table": cell.table, "row": cell.row, "column": cell.column, "network": cell.network,
            "published": cell.published, "mean": result["mean"], "std": result["std"],
            "runs": len(result["accuracies"]), "accuracies": result["accuracies"],
            "settings": published.settings(cell.target, measured.get("changed", {})), **rest, **result["measured"]}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where there is no file. Raises DataError for a line that is none of ours."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            _key(line), line["mean"], line["published"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"line {number} of {path} is not a measured cell: give another --results, or "
                            "remove that line") from None
        lines.append(line)
    return lines


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add `lines` to the results file, but for those that it has already; others may add theirs at the same time."""
    with locked(path.parent):
        before = read(path)
        new = [line for line in lines if line not in before]
        if new:
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*before, *new]).encode())


def write_page(results: Path) -> Path:
    """Write the page of the results file beside it, and give its path."""
    with locked(results.parent):
        write_atomic(results.with_suffix(".md"), page(read(results)).encode())
    return results.with_suffix(".md")


def _key(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["table"], line["row"], line["column"]


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all tables: published and measured, from the lines of a results file alone. Where a cell was measured
    several times its last line counts."""
    last = {_key(line): line for line in lines}
    parts = [_HEAD]
    for found in tables().values():
        parts.append(f"## Table {found.name}: {found.title}\n")
        parts.append(_grid(found, last))
        if found.note:
            parts.append(f"{found.note}\n")
        mine = [(c, last[c.table, c.row, c.column]) for c in found.cells if (c.table, c.row, c.column) in last]
        parts.append(_details(mine) if mine else "Nothing of this table has been run yet.\n")
        gains = _gains(found, last)
        if gains:
            parts.append(gains)
    return "\n".join(parts)


_HEAD = """# The paper's tables, published and measured

Made by `speedk reproduce` from its lines of JSON and nothing else. Each cell is published / **measured**, in per cent
of the test set. "not run" has a command (`speedk reproduce TABLE --row ROW --column COLUMN`), "-" is a number that the
paper does not have, and "n/a" another paper's method, which is not part of speedk. The published code of SPEED reports
the best of ten checkpoints on the test set; what is measured here is the accuracy after the last epoch. A dagger (†)
marks a run that is known to differ from the published one in more than that: the lines below the table say in what,
with what was published (in SPEED's paper or code, or where a baseline comes from) in brackets. What is published
nowhere cannot be compared.
"""


def _grid(found: Table, last: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    rows = [["", *found.columns], ["---"] * (1 + len(found.columns))]
    for row in found.rows:
        cells = [c for c in found.cells if c.row == row]
        rows.append([row, *(_shown(c, last.get((c.table, c.row, c.column))) for c in cells)])
    return _markdown(rows)


def _gains(found: Table, last: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """What SPEED adds to each cell that was measured with and without it, or "" where none was."""
    rows = []
    printed = {(c.row, c.column): c.published for c in found.cells}
    for cell in found.cells:
        plain = cell.row.removesuffix(WITH_SPEED)
        pair = [last.get((found.name, row, cell.column)) for row in (plain, cell.row)]
        if plain == cell.row or any(line is None or line["mean"] is None for line in pair):
            continue
        means = [printed[row, cell.column].split("±")[0] for row in (plain, cell.row)]
        theirs = UNPUBLISHED if UNPUBLISHED in means else f"{float(means[1]) - float(means[0]):+.1f}"
        gain = pair[1]["mean"] - pair[0]["mean"]
        spread = pair[0]["std"] + pair[1]["std"]
        alone = 1 in (pair[0]["runs"], pair[1]["runs"])
        notes = ["no gain" if gain <= 0 else "of one run" if alone else "within the deviations" if gain <= spread else
                 ""]  # fmt: skip
        rates = [line["protocol"]["rate"] for line in pair]
        if rates[0] != rates[1] and pair[0]["objective"] != "tm":  # which learns them
            notes.append(f"evaluated at rates of {rates[0]:g} and {rates[1]:g}")
        rows.append([plain, cell.column, theirs, f"{gain:+.1f}", ", ".join(filter(None, notes))])
    if not rows:
        return ""
    head = ["row", "column", "SPEED's gain, published", "measured", ""]
    return _markdown([head, ["---"] * len(head), *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _shown(cell: Cell, line: Mapping[str, Any] | None) -> str:
    if not cell.published:
        return "-"
    if line is None:
        return f"{cell.published} / {'n/a' if cell.target is None else 'not run'}"
    return f"{cell.published} / **{accuracy(line)}**{'†' if published.differences(cell.target, line) else ''}"


def accuracy(line: Mapping[str, Any]) -> str:
    """Mean and deviation in per cent, as the paper writes them."""
    return mean_std(line["mean"], line["std"], line["runs"], digits=1, sign="±")


def _details(measured: Sequence[tuple[Cell, Mapping[str, Any]]]) -> str:
    rows = [["row", "column", "measured", "runs", "numbers", "of budget", "steps", "distilled in", "device", "split",
             "protocol", "seed", "version", "date", "known to differ"], ["---"] * 15]
    for cell, line in measured:
        version = f"{line['version']} {line['commit']}".strip()
        budget = f"{line['numbers'] / line['budget']:.0%}" if line["budget"] else "-"
        protocol = "{name}, {standardisation}, rate {rate:.3g}".format(**line["protocol"])
        rows.append([line["row"], line["column"], accuracy(line), str(line["runs"]), f"{line['numbers']:,}", budget,
                     f"{line['steps']:,}", f"{line['distil_seconds'] / 60:,.1f} min", line["device"], line["split"],
                     protocol, str(line["seed"]), version, line["date"],
                     ", ".join(published.differences(cell.target, line)) or "in nothing"])
    return _markdown(rows)
