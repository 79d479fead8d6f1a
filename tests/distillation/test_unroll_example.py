"""The example that distils pixels with `speedk.unroll` runs, and its images teach more than real ones."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "unroll_pixels.py"


def test_learned_images_teach_more_than_real_ones():
    with torch.random.fork_rng():
        real, learned = runpy.run_path(str(EXAMPLE))["main"](experts=1, iterations=12)
    assert 0.3 < real < learned


def test_it_is_short_enough_to_be_pasted():
    assert len(EXAMPLE.read_text().splitlines()) <= 60
