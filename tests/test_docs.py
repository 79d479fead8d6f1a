"""What the documents say can be typed, run and followed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from speedk.cli import _module, _parser, commands
from speedk.distillation import recipe
from speedk.evaluation.paper import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])

NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV", "XV")


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, fenced or indented, continued ones joined, and the commands in its tables."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
        elif line.startswith("|"):
            lines += re.findall(r"`(speedk [^`]+)`", line)
    return re.sub(r" *\\\n", " ", "\n".join(lines)).split("\n")  # a shell goes on after a backslash


def typed() -> list[str]:
    """Every speedk command line of the documents and of the recipes."""
    recipes = [line.removeprefix("#").strip() for path in (ROOT / "speedk/recipes").glob("*.toml")
               for line in path.read_text().splitlines() if line.startswith("#")]
    found = [part.split("#")[0].strip() for page in PAGES for line in code(page) for part in line.split(";")]
    return sorted({line for line in found + recipes if line.startswith("speedk ")})


@pytest.mark.parametrize("line", typed())
def test_a_command_parses(line):
    parser = _parser({name: _module(module) for name, module in commands().items()})
    args, rest = parser.parse_known_args(shlex.split(line)[1:])
    assert args.command and all("=" in word and not word.startswith("-") for word in rest), rest


def test_every_table_and_figure_of_the_paper_has_its_line():
    lines = (ROOT / "docs/paper.md").read_text().splitlines()
    named = {name for line in lines for name in re.findall(r"^\| ((?:Table|Figure) \w+)", line)}
    assert named == {*(f"Table {n}" for n in [*range(1, 11), *NUMERALS[:5]]),
                     *(f"Figure {n}" for n in [*range(1, 5), *NUMERALS])}


@pytest.mark.parametrize("line", [line for line in code(ROOT / "docs/paper.md") if line])
def test_a_command_of_the_paper_names_what_there_is(line):
    parser = _parser({name: _module(module) for name, module in commands().items()})
    args, rest = parser.parse_known_args(shlex.split(line)[1:])
    folders = {f"{cell.target.folder}-seed0" for found in tables.tables().values() for cell in found.cells
               if cell.target}
    assert {Path(word).parts[2] for word in shlex.split(line) if word.startswith("runs/tables/")} <= folders
    if args.command == "reproduce":
        assert tables.table(args.fields[0]).select(args.row, args.column)
    if args.command in ("distill", "sweep"):
        for value in (0, -1):
            pairs = [f"{key}={values.split(',')[value]}" for key, values in (word.split("=") for word in args.fields)]
            made = recipe.resolve(recipe.read(args.recipe), args.objective, recipe.parse_overrides(pairs + rest))
            made.budget(recipe.geometry(made))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        wanted = (page.parent / path).resolve() if path else page
        assert wanted.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", wanted.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}, target


def test_the_five_lines(tmp_path, monkeypatch):
    """As they stand in the README, but for how long they take."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
                 if "speedk.distill" in b)
    quick = block.replace("ipc=1,", "ipc=1, steps=2, fit_steps=3, batch=4,")
    quick = quick.replace('protocol="quick"', 'protocol="quick", epochs=1, runs=1')
    assert quick.count("\n") == 5 and len(quick) > len(block) + 40
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(quick, names)
    assert names["images"].shape == (80, 1, 32, 32) and names["labels"].shape == (80,)
