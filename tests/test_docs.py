"""What the documents say can be typed, run and followed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from speedk.cli import _module, _parser, commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, fenced or indented, continued ones joined."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
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
