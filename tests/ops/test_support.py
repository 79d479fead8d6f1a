"""The pairs of backend and device that a test runs on: those that dispatch has a kernel for."""

from __future__ import annotations

import pytest
from support import QUESTIONS, on_backends

from speedk.ops import dispatch


@pytest.mark.skipif(dispatch.native() is None, reason="not built")
@pytest.mark.parametrize("op", QUESTIONS)
def test_a_device_without_a_kernel_is_skipped(op):
    """"meta" stands for a device of which the native backend knows nothing."""
    pairs = {param.values: param.marks[0] for param in on_backends(op, ["cpu", "meta"]).args[1]}
    assert set(pairs) == {(b, d) for b in ("native", "torch") for d in ("cpu", "meta")}
    assert [p for p, mark in pairs.items() if mark.args[0]] == [("native", "meta")]
    assert "meta" in pairs["native", "meta"].kwargs["reason"]
