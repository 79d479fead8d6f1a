"""The pairs of backend and device that a test runs on: those that have a kernel."""

from __future__ import annotations

import pytest
import torch
from support import built, on_backends
from test_public_ops import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from speedk.ops import dispatch


@built
@pytest.mark.parametrize("op", [op for op in dispatch.ops() if "native" in dispatch._ops[op].backends])
def test_a_device_without_a_kernel_is_skipped(op):
    pairs = {param.values: param.marks[0] for param in on_backends(op, ["cpu", "cuda"]).args[1]}
    assert set(pairs) == {(b, d) for b in ("native", "torch") for d in ("cpu", "cuda")}
    table = dispatch._ops[op]
    without = {("native", "cpu")} if not table.cpu else set()
    without |= set() if table.cuda and dispatch.native_cuda() else {("native", "cuda")}
    assert {p for p, mark in pairs.items() if mark.args[0]} == without
    assert all(pairs[p].kwargs["reason"] for p in without)


@built
@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_a_gpu_is_what_tensors_there_are_told(name):
    """Tensors of a GPU without values need none to be here."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = tree_map(lambda x: x.new_empty(x.shape, device="cuda") if isinstance(x, torch.Tensor) else x,
                         CASES[name])
        told = dispatch.explain(name, *there)["native"]
    if told.startswith("there is no kernel for D="):  # which nobody can say of every input
        return
    assert (told in ("chosen", "available")) == (dispatch.installed(name, "cuda")["native"] in ("chosen", "available"))
