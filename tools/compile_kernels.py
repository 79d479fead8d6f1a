"""Compile every Triton kernel for GPUs that are not at hand, and print what each asks of the chip.

The launchers run on tensors without memory ("meta") at the recipes' shapes, with the launch itself replaced: what is
compiled is what they choose and specialise, not a list that could fall behind. `python tools/compile_kernels.py
[--json] [--arch 80 90] [--only NAME] [--case NAME]`; must run with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent))
from kernel_cases import cases

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.uint16: "u16",
         torch.int32: "i32", torch.bool: "i1"}  # fmt: skip
LAUNCHES: list[tuple] = []


def capture(launches: dict, label: str, function: JITFunction, args: tuple, kwargs: dict) -> None:
    """Note one launch as Triton's runtime would specialise it: 1 is a constant, multiples of 16 are said to be."""
    names = [p.name for p in function.params]
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    signature, constants, attrs = {}, {}, {}
    for i, p in enumerate(function.params):
        value = given[p.name]
        if p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = "*" + TYPES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        elif value is None or (value == 1 and not p.do_not_specialize):
            signature[p.name], constants[(i,)] = "constexpr", value
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not p.do_not_specialize:
                attrs[(i,)] = [["tt.divisibility", 16]]
    key = repr((function.fn.__qualname__, signature, constants, attrs, options))
    launches.setdefault(key, (label, function, signature, constants, attrs, options))


def collect(only: str, case: str) -> list[tuple]:
    launches: dict = {}
    for label, call in cases():
        if case not in label:
            continue

        def run(self, *args, grid, warmup, label=label, **kwargs):
            if only in self.fn.__name__:
                capture(launches, label, self, args, kwargs)

        JITFunction.run = run
        call()
    return list(launches.values())


def compile_one(task: tuple[int, int]) -> dict:
    """Compile launch number task[1] of LAUNCHES, which a forked worker has and a kernel cannot be pickled into."""
    arch, launch = task[0], LAUNCHES[task[1]]
    label, function, signature, constants, attrs, options = launch
    row = {"kernel": function.fn.__name__, "case": label, "arch": arch}
    try:
        source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # a report of what does not compile must go on to the next
        return row | {"error": f"{type(error).__name__}: {str(error)[-300:]}"}
    usage = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return row | {
        "warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared, "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"], "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)), "fma": len(re.findall(r"\bfma\.rn", ptx)),
    }  # fmt: skip


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory a thread (where spilled registers go)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--case", default="", help="part of a case's name")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile under the interpreter")
    LAUNCHES[:] = collect(options.only, options.case)
    tasks = [(arch, number) for number in range(len(LAUNCHES)) for arch in options.arch]
    longest_first = sorted(tasks, key=lambda task: -len(LAUNCHES[task[1]][1].src))  # no core is left alone with one
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        done = dict(zip(longest_first, pool.map(compile_one, longest_first, chunksize=1)))
    rows = [done[task] for task in tasks]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['kernel']:32} sm_{row['arch']} {row['case']:44} " + (row.get("error") or " ".join(
            f"{name} {row[name]:>6}" for name in ("warps", "shared", "registers", "spilled", "wgmma", "mma", "fma"))))


if __name__ == "__main__":
    main()
