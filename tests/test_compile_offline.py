"""Every Triton kernel compiles for GPUs that are not at hand, within what their chips hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may ask for
SPILLED = {"_freenet_block_fwd_kernel": 320, "_freenet_block_bwd_kernel": 416, "_add_layer_norm_bwd_kernel": 160}
"""Bytes a thread may spill, 64 where nothing is said. The first two hold whole rows of several matrices at a time: on
an H200 four warps that spill are faster than eight that do not, as a norm then needs no other warp; the third spills at
its widest rows alone, 56 with Triton 3.7 and 152 with 3.6. What is left over differs between versions of Triton."""
WARPS = {"_add_layer_norm_fwd_kernel": 24, "_coo_decode_fwd_kernel": 32, "_coo_decode_bwd_kernel": 48,
         "_mhsc_coo_fwd_kernel": 28, "_patches_kernel": 28}  # fmt: skip
"""Warps that registers and shared memory must leave room for on a multiprocessor, 8 where nothing is said (two for each
of its schedulers): these move memory, and hide its latency behind one another."""

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def table() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def named(rows: list[dict]) -> str:
    return "\n".join(" ".join(f"{k} {v}" for k, v in row.items()) for row in rows)


def test_all_compile(table):
    assert not (failed := [row for row in table if "error" in row]), named(failed)


def test_every_kernel_is_there(table):
    written = {name for path in (ROOT / "kernels").glob("*.py")
               for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}  # fmt: skip
    assert written == {row["kernel"] for row in table}
    assert {row["arch"] for row in table} == set(SHARED)


def test_they_fit_on_chip(table):
    assert not (over := [row for row in table if row["shared"] > SHARED[row["arch"]]]), named(over)


def test_nothing_spills(table):
    assert not (over := [row for row in table if row["spilled"] > SPILLED.get(row["kernel"], 64)]), named(over)


def resident_warps(row: dict) -> int:
    """How many warps fit a multiprocessor at once: 65,536 registers, and shared memory of which a block's share is
    1 KiB more than it asks for."""
    by_registers = 65536 // (row["registers"] * 32 * row["warps"])
    by_shared = (SHARED[row["arch"]] + 1024) // (row["shared"] + 1024)
    return min(by_registers, by_shared, 64 // row["warps"]) * row["warps"]


def test_enough_warps_fit_at_once(table):
    assert not (few := [row for row in table if resident_warps(row) < WARPS.get(row["kernel"], 8)]), named(few)


def test_products_reach_the_tensor_cores(table):
    """Each kernel that multiplies matrices does so there, in full float32 by three products of halves."""
    products = {row["kernel"] for row in table if row["case"].startswith("tf32")}
    rows = [row for row in table if row["kernel"] in products]
    assert not (missed := [row for row in rows if not row["mma"] + row["wgmma"]]), named(missed)
