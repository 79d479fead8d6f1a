"""The names that the package offers, and that asking for none of them costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import speedk


@pytest.mark.parametrize("name", ["evaluate", "load", "distill", "unroll", "FReeNet", "explain", "use_backend"])
def test_public_names_are_callable(name):
    assert callable(getattr(speedk, name)) and name in dir(speedk) and name in speedk.__all__


def test_public_modules():
    assert callable(speedk.ops.mhsc) and issubclass(speedk.errors.ArtifactError, speedk.errors.SpeedkError)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'destill'"):
        _ = speedk.destill


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, speedk; print([n for n in ('torch', 'numpy', 'PIL') if n in sys.modules], speedk.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {speedk.__version__}\n"
