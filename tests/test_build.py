"""What SPEEDK_CUDA asks of the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("choice", "refusal"), [
    ("ON", "SPEEDK_CUDA=ON, but nvcc is neither on PATH nor under CUDA_HOME"),
    ("maybe", "SPEEDK_CUDA=maybe is not AUTO, ON or OFF"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused(choice, refusal, tmp_path):
    """In one line, with an exit code that `make` and pip see; the default goes on without what does not build."""
    if shutil.which("nvcc", path=os.defpath):
        pytest.skip("nvcc is on the system's own path")
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "SPEEDK_CUDA")}
    environment |= {"PATH": os.defpath, "SPEEDK_CUDA": choice}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == f"error: {refusal}"
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
