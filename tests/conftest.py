"""Where there is no GPU, Triton kernels run under Triton's interpreter; it must be said before they are imported. And
every test draws the same random numbers, whichever ran before it."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
