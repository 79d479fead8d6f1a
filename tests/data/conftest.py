"""A cache of each test's own, and the real data where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPEEDK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The folder with cifar10/ and imagenette/, where there is one."""
    place = os.environ.get("SPEEDK_TEST_DATA")
    if not place or not Path(place, "cifar10").is_dir() or not Path(place, "imagenette").is_dir():
        pytest.skip("SPEEDK_TEST_DATA does not name a folder with cifar10/ and imagenette/")
    return Path(place)
