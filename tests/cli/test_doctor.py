"""speedk doctor names every op, what it takes here, and why not the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from speedk.cli import main
from speedk.ops import dispatch, use_backend


def test_every_op_is_told(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for op in dispatch.ops():
        assert lines[op].split()[1] in dispatch.BACKENDS
    assert lines["native"].split()[1].startswith("built") == (dispatch.native() is not None)


@pytest.mark.skipif(dispatch.native() is None, reason="the extension is not built")
def test_each_device_is_told_what_it_takes(capsys, monkeypatch):
    """A GPU, Triton, and an extension that was built without nvcc."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(dispatch, "native_missing", lambda: None)
    monkeypatch.setattr(dispatch, "native_cuda", lambda: False)
    assert main(["doctor"]) == 0
    gpu, cpu = capsys.readouterr().out.split("op on the GPU")[1].split("op on the CPU")
    on_gpu, on_cpu = ({line.split()[0]: line for line in part.splitlines()[1:] if line} for part in (gpu, cpu))
    for op in ("sparsify", "topk_mask", "coo_encode", "norm_act_pool", "unroll_step", "unroll_step_adjoint"):
        assert on_gpu[op].split()[1] == "torch" and "built without its CUDA files" in on_gpu[op]
        assert on_cpu[op].split()[1] == "native"
    assert on_gpu["mhsc"].split()[1] == "triton" and "native: the kernel is for the CPU" in on_gpu["mhsc"]
    assert on_cpu["mhsc"].split()[1] == "native" and "triton: the kernel is for the GPU" in on_cpu["mhsc"]


@pytest.mark.parametrize(("value", "message"), [("best", "'best' is not one of triton, native, torch"),
                                               ("triton", "cannot run on the triton backend")])
def test_what_the_variable_cannot_force_is_said_in_one_line(value, message, file, tmp_path):
    words = ["decode", str(file), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "speedk", *words], capture_output=True, text=True,
                          env={**os.environ, "SPEEDK_BACKEND": value, "TRITON_INTERPRET": "0"})  # on the CPU
    assert done.returncode == 1 and done.stderr.startswith("speedk: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and "bug" not in done.stderr


def test_a_forced_backend_that_cannot_run(capsys):
    with use_backend("triton"):
        assert main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["forced"].endswith("triton")
    assert "nothing" in lines["sparsify"] and "there is no triton kernel of sparsify" in lines["sparsify"]
