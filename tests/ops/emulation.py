"""CUDA kernels compiled for the CPU, where cuda_on_cpu.h runs them a thread at a time."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def emulated(op: str, folder: Path) -> Callable[..., bool]:
    """`op`_on_cpu of the file of that name; false where threads wait for others that ended."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = folder / f"{op}.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-I", CSRC,
               "-o", library, HERE / f"{op}_on_cpu.cpp"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _callable(ctypes.CDLL(str(library)), op)


def also(call: Callable[..., bool], op: str) -> Callable[..., bool]:
    """`op`_on_cpu of the file that `call` is from."""
    return _callable(call.library, op)


def _callable(library: ctypes.CDLL, op: str) -> Callable[..., bool]:
    call = getattr(library, f"{op}_on_cpu")
    call.restype, call.library = ctypes.c_bool, library
    return call
