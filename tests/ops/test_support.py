"""The pairs of backend and device that a test runs on: those that have a kernel."""

from __future__ import annotations

import pytest
from support import on_backends

from speedk.ops import dispatch


@pytest.mark.skipif(dispatch.native() is None, reason="not built")
@pytest.mark.parametrize("op", [op for op in dispatch.ops() if "native" in dispatch._ops[op].backends])
def test_a_device_without_a_kernel_is_skipped(op):
    pairs = {param.values: param.marks[0] for param in on_backends(op, ["cpu", "cuda"]).args[1]}
    assert set(pairs) == {(b, d) for b in ("native", "torch") for d in ("cpu", "cuda")}
    without = [] if dispatch._ops[op].cuda and dispatch.native_cuda() else [("native", "cuda")]
    assert [p for p, mark in pairs.items() if mark.args[0]] == without
    assert all(pairs[p].kwargs["reason"] for p in without)
