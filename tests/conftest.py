"""Where there is no GPU, Triton kernels run under Triton's interpreter; it must be said before they are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
