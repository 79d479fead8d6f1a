"""Every CUDA file compiles for GPUs that are not at hand, and the extension imports where there is no driver."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speedk.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))

# At most 64, so that two blocks of 512 threads fit a multiprocessor; at blocks of 256, three fit with 80. Where tokens
# stay in registers, all that a thread may have; and a few, moved once, may be in memory.
REGISTERS = {"norm_act_pool.cu": 80, "freenet_block.cu": 255, "row_products.cu": 168, "linear_backward.cu": 255}
SPILLED = {"freenet_block.cu": 256, "row_products.cu": 64, "linear_backward.cu": 96}  # bytes, stored and loaded


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_within_its_registers(source, arch, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-DSPEEDK_CUDA", "-Xptxas", "-v", "-cubin",
               "-o", str(tmp_path / "out.cubin"), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = done.stderr.split("Compiling entry function '")[1:]
    assert parts, done.stderr
    for part in parts:
        name = part.partition("'")[0]
        spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        shared = int(shared[1]) if shared else 0
        print(f"sm_{arch} {name}: {registers} registers, {shared} bytes shared, {spilled} bytes spilled")
        assert spilled <= SPILLED.get(source.name, 0), name
        limit = REGISTERS.get(source.name, 64)
        assert registers <= limit, f"{name}: more than {limit} registers"
        assert shared <= 48 * 1024, name


@pytest.mark.skipif(dispatch.native() is None, reason="the extension is not built")
def test_imports_without_a_driver():
    """The CUDA runtime is inside, and nothing of the driver is asked for at import."""
    code = "import torch, speedk._native as n; print(n.isa(), n.cuda)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("ldd"):
        needed = subprocess.run(["ldd", dispatch.native().__file__], capture_output=True, text=True).stdout
        assert not re.search(r"libcud|libnv|libtorch|libc10", needed), needed
