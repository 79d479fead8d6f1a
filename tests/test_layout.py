"""The shape of the project: which folder imports which, and each op's places."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from speedk.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "speedk"

# A module imports from floors below its own, or from its own folder. What is not named here stands below everything.
FLOORS = {
    "speedk.kernels": 1, "speedk.data": 1, "speedk.augment": 1, "speedk.corruptions": 1,
    "speedk.ops": 2,
    "speedk.networks": 3,
    "speedk.training": 4,
    "speedk.distillation": 5,
    "speedk.evaluation": 6,
    "speedk.cli": 7,
}  # fmt: skip
TOP = {"speedk", "speedk.__main__"}  # the public names, which are looked up lazily, and `python -m speedk`

# Where an op has no file of its basename in a place, and why.
WITHOUT = {
    "kernels": {
        "topk": "on a GPU it runs in CUDA: a selection needs no matrix unit, and its results have no fixed place",
        "unroll_step": "on a GPU it runs in CUDA, whose blocks give d_lr a fixed order of summation",
        "norm_act_pool": "on a GPU it runs in CUDA, which shares its arithmetic with the CPU's kernels",
    },
    "csrc": {
        "add_layer_norm": "on the CPU it is one pass of PyTorch, or part of freenet's",
    },
    "bench": {},
}

# Which op has no kernel of a backend, and why.
NO_KERNEL = {
    "triton": {
        "topk_mask": WITHOUT["kernels"]["topk"],
        "sparsify": WITHOUT["kernels"]["topk"],
        "coo_encode": "on a GPU it runs in CUDA: it is topk's kernel, which writes what it selects in its order",
        "unroll_step": WITHOUT["kernels"]["unroll_step"],
        "unroll_step_adjoint": WITHOUT["kernels"]["unroll_step"],
        "norm_act_pool": WITHOUT["kernels"]["norm_act_pool"],
    },
    "native": {
        "add_layer_norm": WITHOUT["csrc"]["add_layer_norm"],
    },
}


def modules() -> dict[str, Path]:
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        inside = path.relative_to(ROOT)
        parts = ["speedk", *inside.parts] if inside.parts[0] == "kernels" else list(inside.parts)
        found[".".join(parts).removesuffix(".py").removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """What a file imports when it is imported or run, but for the types that a checker alone sees."""
    names = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in names if name == "speedk" or name.startswith("speedk.")}


def folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_floors():
    wrong = []
    for module, path in modules().items():
        if module in TOP:
            continue
        own = FLOORS.get(folder(module), 0)
        for name in imports(path):
            below = folder(name)
            if below != folder(module) and FLOORS.get(below, 0) >= max(own, 1):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    known = modules()
    graph = {}
    for module, path in known.items():
        wanted = set()
        for name in imports(path) - {"speedk"}:
            while name not in known:
                name = name.rpartition(".")[0]
            wanted.add(name)
        graph[module] = wanted - {module, "speedk"} if module not in TOP else set()
    top_level = {m: {n for n in graph[m] if _imported_at_the_top(known[m], n)} for m in graph}
    done, open_ = set(), []

    def walk(module: str) -> None:
        if module in open_:
            raise AssertionError(" -> ".join([*open_[open_.index(module):], module]))
        if module in done:
            return
        open_.append(module)
        for name in sorted(top_level[module]):
            walk(name)
        open_.pop()
        done.add(module)

    for module in sorted(top_level):
        walk(module)


def _imported_at_the_top(path: Path, name: str) -> bool:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (
                node.module == name or any(f"{node.module}.{a.name}" == name for a in node.names)):
            return True
        if isinstance(node, ast.Import) and any(a.name == name for a in node.names):
            return True
    return False


def ops() -> list[str]:
    # The last is a part of freenet, in its own file.
    shared = {"__init__", "arguments", "autocast", "dispatch", "native", "native_block", "native_linear", "registered",
              "freenet_block"}
    return sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if p.stem not in shared)


PLACES = {
    "kernels": ["kernels/{}.py"],
    "csrc": ["csrc/{}.h", "csrc/{}.cpp"],
    "tests": ["tests/ops/test_{}*.py"],
    "bench": ["bench/bench_{}.py"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", ops())
def test_each_op_has_its_places(op, place):
    missing = [name for pattern in PLACES[place] if not list(ROOT.glob(name := pattern.format(op)))]
    reason = WITHOUT.get(place, {}).get(op)
    assert bool(missing) == bool(reason), f"missing {missing}, and WITHOUT says {reason!r}"


@pytest.mark.parametrize("backend", NO_KERNEL)
def test_each_op_has_a_kernel_or_a_reason(backend):
    assert {op for op, table in dispatch._ops.items() if backend not in table.backends} == set(NO_KERNEL[backend])


def test_files_stay_readable():
    rest = [path for folder in ("csrc", "bench", "tools", "tests", "examples") for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".sh", ".h", ".cpp", ".cu", ".cuh")]  # fmt: skip
    texts = {path.relative_to(ROOT): path.read_text().splitlines() for path in [*modules().values(), *rest]}
    long = {str(path): len(lines) for path, lines in texts.items() if len(lines) > 400}
    assert not long, f"over 400 lines, which is asking to be two files: {long}"
    wide = [f"{path}:{i}" for path, lines in texts.items() for i, line in enumerate(lines, 1) if len(line) > 120]
    assert not wide, f"over 120 columns: {wide}"


def prose(page: Path) -> list[tuple[int, str]]:
    """The numbered lines of a page but for its code, its tables and lines with a link, which cannot be broken."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "|")) and "](" not in line:
            found.append((number, line))
    return found


def test_pages_stay_readable():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    wide = [f"{page.relative_to(ROOT)}:{i}" for page in sorted(pages) if page.name != "results.md"  # which code writes
            for i, line in prose(page) if len(line) > 120]
    assert not wide, f"over 120 columns: {wide}"
