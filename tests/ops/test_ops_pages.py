"""What README.md, docs/ops.md and the example say of the ops, and that it runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from support import FLOATS, built
from test_public_ops import CASES
from torch.utils._pytree import tree_map

from speedk.ops import dispatch, explain

ROOT = Path(__file__).resolve().parents[2]


def rows(page: str) -> list[list[str]]:
    """The cells of the rows of a page's tables that name an op first."""
    lines = (line.strip("|").split("|") for line in (ROOT / page).read_text().splitlines() if line.startswith("| `"))
    return [[cell.strip() for cell in line] for line in lines]


def test_the_tables_of_backends_are_those_of_dispatch():
    """The README has a column for each, docs/ops.md says it in words."""
    want = {op: ("triton" in table.backends, table.cuda, "native" in table.backends and table.cpu)
            for op, table in dispatch._ops.items()}  # fmt: skip
    short = {op: tuple(cell.startswith("yes") for cell in row[1:4]) for row in rows("README.md")
             for op in re.findall(r"`(\w+)`", row[0])}  # fmt: skip
    assert short == want
    full = {re.match(r"`(\w+)", row[0])[1]: row[-1] for row in rows("docs/ops.md")}
    assert {op: tuple(word in said for word in ("Triton", "CUDA", "native CPU")) for op, said in full.items()} == want


@built
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_dtypes_of_the_native_kernels(dtype):
    """On the CPU, those in parentheses behind the name, or all where there are none."""
    for row in rows("docs/ops.md"):
        op, said = re.match(r"`(\w+)", row[0])[1], re.search(r"native CPU(?: and CUDA)?(?: \(([^)]*)\))?", row[-1])
        named = said and (not said[1] or str(dtype).removeprefix("torch.") in said[1])
        given = tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
                         CASES[op])  # fmt: skip
        assert (explain(op, *given)["native"] == "chosen") == bool(named), f"{op} in {dtype}"


def test_the_code_of_the_page():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/ops.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["features"].shape == (8, 64, 96)
    assert names["codes"].grad.count_nonzero() == 8 * 3 * 48 and names["tokens"].grad.isfinite().all()


def test_the_example(capsys):
    """Its loop, at a tenth of its length."""
    main = runpy.run_path(str(ROOT / "examples/train_with_ops.py"))["main"]
    assert main.__globals__["STEPS"] == 200
    main.__globals__["STEPS"] = 20
    last = main()
    told = capsys.readouterr().out
    assert "sparsify runs on" in told and last < 0.9 * float(re.search(r"step +0: .* ([\d.]+)\n", told)[1])
