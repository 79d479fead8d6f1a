"""Where there is no memory for what a CPU kernel needs itself, Python gets a MemoryError, from any of its threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from speedk.ops import dispatch

pytestmark = pytest.mark.skipif(dispatch.native() is None, reason="the extension is not built")

# Sizes that no machine holds, with addresses that are never reached. A kernel that goes on regardless ends the process.
CALLS = {
    "coo_decode": "n.coo_decode(n.Entries(0, 0, 0, 0, 1, 2, 0, 1 << 25, 1 << 25), 0, 2)",
    "mhsc_coo": "n.mhsc_coo(n.Entries(0, 0, 0, 0, 1, 2, 0, 1 << 40, 1), 0, 1, 1024, 0, 2)",
    "mhsc, before its threads": "n.mhsc(n.Mhsc(0, 2, 1, 1, 1 << 40, 1024, 0, 0, 2), 0)",
    "mhsc": "n.mhsc(n.Mhsc(0, 2, 1, 1 << 40, 1, 1024, 0, row, 2), 0)",
    "mhsc_backward": "n.mhsc_backward(n.Mhsc(0, 16, 1, 1, 1 << 25, 1, 0, row, 2), 0, row, 0, 0)",
    "decode": "n.decode(n.Net(1, 1, 1 << 20, 1, 1, 1, 1, False, row, 0, 0, 0, 0, [0] * 12, 2), 0, 0)",
    "decode, of codes": "n.decode(n.Net(1, 1, 1 << 20, 1, 1, 1, 1, False, 0, 1, 1 << 20, 0, 0, [0] * 12, 2), 0, 0)",
    "decode_backward": "n.decode_backward(n.Net(1, 1, 1 << 20, 1, 1, 1, 1, False, row, 0, 0, 0, 0, [0] * 12, 2), "
                       "0, 0, 0, True, [0] * 12, 0)",
    "topk": "n.topk(n.Topk(0, 0, 2, 1 << 15, 1 << 14, 1, 0, 0, 0, 0, 0, 0, 2))",
}
SCRIPT = """
import ctypes, importlib.util, mmap, resource, sys
{torch}
spec = importlib.util.spec_from_file_location("_native", {path!r})
n = importlib.util.module_from_spec(spec)
spec.loader.exec_module(n)
assert n.parallel_backend() == {backend!r}
data = (ctypes.c_float * (1 << 25))()
row = ctypes.addressof(data)
with open("/proc/self/statm") as sizes:  # a build of PyTorch with CUDA has more than 2 GiB of addresses itself
    taken = int(sizes.read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), resource.RLIM_INFINITY))
for call in {calls!r}:
    try:
        eval(call)
    except MemoryError:
        continue
    sys.exit(call)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process as Linux does")
@pytest.mark.parametrize("backend", ["openmp", "threads"])
def test_memory_error(backend):
    """PyTorch brings OpenMP along; without it the kernels start threads of their own."""
    torch = "import torch" if backend == "openmp" else ""
    script = SCRIPT.format(torch=torch, path=dispatch.native().__file__, backend=backend, calls=[*CALLS.values()])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
