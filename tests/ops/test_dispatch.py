"""Which backend runs, and what is said of those that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import built

from speedk.ops import dispatch, explain, sparsify, use_backend


def table(**backends) -> dispatch.Op:
    op = dispatch.Op("trial", **backends)
    del dispatch._ops["trial"]
    return op


def test_first_that_takes_the_arguments(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    op = table(triton=lambda x: None if x > 1 else "x is small", native=lambda x: None if x > 0 else "x is 0")
    assert [op.choose(x) for x in (2, 1, 0)] == ["triton", "native", "torch"]
    assert op.why_not("triton", 1) == "x is small"
    assert table().choose(3) == "torch"


def test_the_interpreter_is_never_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    op = table(triton=lambda: None)
    assert op.choose() == "torch"
    with use_backend("triton"):
        assert op.choose() == "triton"


def test_strict():
    op = table(native=lambda x: "x is odd" if x % 2 else None)
    with use_backend("native"):
        assert op.choose(2) == "native"
        with pytest.raises(ValueError, match="trial cannot run on the native backend: x is odd"):
            op.choose(1)
    with use_backend("triton"), pytest.raises(ValueError, match="there is no triton kernel of trial"):
        op.choose(2)
    with pytest.raises(ValueError, match="cuda"):
        use_backend("cuda")


def test_use_backend_as_a_call_and_as_a_context():
    try:
        use_backend("torch")
        assert dispatch._forced == "torch"
        with use_backend("native"):
            assert dispatch._forced == "native"
        assert dispatch._forced == "torch"
    finally:
        use_backend(None)
    assert dispatch._forced is None


def test_bodies_in_several_threads():
    """Each takes back its own, whichever leaves first."""
    first, second = use_backend("torch"), use_backend("native")
    use_backend(None)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert dispatch._forced == "native"
    second.__exit__()
    assert dispatch._forced is None


def test_a_context_that_is_made_early():
    try:
        body = use_backend("native")
        use_backend("torch")
        with body:
            assert dispatch._forced == "native"
        assert dispatch._forced == "torch"
        with body, body:
            assert dispatch._forced == "native"
        assert dispatch._forced == "torch"
    finally:
        use_backend(None)


def test_a_call_inside_a_body_holds_to_its_end():
    with use_backend("torch"):
        use_backend("native")
        assert dispatch._forced == "native"
        with use_backend("triton"):
            assert dispatch._forced == "triton"
        assert dispatch._forced == "native"
        use_backend(None)
        assert dispatch._forced is None
    assert dispatch._forced is None


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "native_missing", lambda: None)
    monkeypatch.setattr(dispatch, "native_cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(dispatch, "_too_old", dispatch._too_old.__wrapped__)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert "capability 8.0 or later" in dispatch.why_not_native_cuda(x)
    assert "capability 8.0 or later" in dispatch.installed("sparsify", "cuda")["native"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert dispatch.why_not_native_cuda(x) is None
    assert dispatch.installed("sparsify", "cuda")["native"] == "chosen"


def test_explain():
    found = explain("sparsify", torch.randn(1, 1, 4, 4), 2)
    assert list(found) == ["triton", "native", "torch"]
    assert "no triton kernel" in found["triton"]
    assert sorted(found.values()).count("chosen") == 1
    assert set(explain("sparsify")) == set(found)
    with pytest.raises(ValueError, match="sparsify"):
        explain("nothing")


def test_environment_variable():
    def run(value: str) -> str:
        code = "import torch; from speedk.ops import sparsify; print(sparsify(torch.ones(1, 1, 2, 2), 1).sum().item())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env={**os.environ, "SPEEDK_BACKEND": value})  # fmt: skip
        return done.stdout + done.stderr

    assert run("torch") == "1.0\n"
    assert "there is no triton kernel of sparsify" in run("triton")
    assert "'best' is not one of triton, native, torch" in run("best")


def test_a_transform_cannot_be_forced_onto_a_kernel():
    with use_backend("native"), pytest.raises(ValueError, match="functorch"):
        torch.func.grad(lambda x: sparsify(x, 1).sum())(torch.randn(1, 1, 2, 2))


@built
def test_the_extension_shares_the_openmp_pool_of_torch():
    """Two pools would fight for the same cores; see csrc/parallel.h."""
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("this torch does not run on OpenMP")
    assert dispatch.native().parallel_backend() == "openmp"
