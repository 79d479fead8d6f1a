"""Packages, data files, and the C++/CUDA extension `speedk._native`, which is built by CMake and may fail to build.

SPEEDK_CUDA=AUTO (default) compiles the CUDA files where nvcc is found, whether or not a GPU is visible, and falls back
to the CPU files alone where nvcc fails; ON insists: without them the build fails; OFF leaves them out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent


class BuildNative(build_ext):
    """Builds with CMake and ninja. The extension is optional but for SPEEDK_CUDA=ON: a failure is printed and the
    package goes on without."""

    def finalize_options(self) -> None:
        super().finalize_options()
        given = os.environ.get("SPEEDK_CUDA") or "AUTO"
        if given.upper() not in ("AUTO", "ON", "OFF"):
            raise OptionError(f"SPEEDK_CUDA={given} is not AUTO, ON or OFF")
        self.choice = given.upper()
        for extension in self.extensions or ():
            extension.optional = self.choice != "ON"

    def build_extension(self, ext: Extension) -> None:
        choice, nvcc = self.choice, _nvcc()
        if choice == "ON" and nvcc is None:
            raise CompileError("SPEEDK_CUDA=ON, but nvcc is neither on PATH nor under CUDA_HOME")
        try:
            self._cmake(ext, nvcc if choice != "OFF" else None)
        except CompileError as error:
            if choice != "AUTO" or nvcc is None:
                raise
            print(f"speedk: the CUDA files do not build here ({error}); going on with the CPU files", file=sys.stderr)
            self._cmake(ext, None)

    def _cmake(self, ext: Extension, nvcc: str | None) -> None:
        try:
            import pybind11
        except ImportError:
            raise CompileError("pybind11 is missing: pip install pybind11 cmake ninja") from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            _tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPEEDK_CUDA={'ON' if nvcc else 'OFF'}", f"-DSPEEDK_OUTPUT={target}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        for command in (configure, [_tool("cmake"), "--build", str(build)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(done.stdout[-6000:], file=sys.stderr)
                raise CompileError(f"{_first_error(done.stdout)}")


def _tool(name: str) -> str:
    """The path of cmake or ninja: beside this interpreter (their PyPI packages put them there), or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise CompileError(f"{name} is missing: pip install {name}")
    return found


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    inside = Path(home) / "bin" / "nvcc" if home else None
    return str(inside) if inside is not None and inside.exists() else shutil.which("nvcc")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    for position, line in enumerate(lines):
        if "Could NOT find Python" in line:
            return "Python.h is missing: apt-get install python3-dev"
        if "error" in line.lower():
            return " ".join(lines[position:position + 3])[:200]
    return lines[-1] if lines else "cmake failed without a word"


setup(
    packages=[*find_namespace_packages(include=["speedk", "speedk.*"], exclude=["speedk.recipes"]), "speedk.kernels"],
    package_dir={"speedk.kernels": "kernels"},
    package_data={"speedk": ["recipes/*.toml", "evaluation/paper/paper.toml"]},
    ext_modules=[Extension("speedk._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
