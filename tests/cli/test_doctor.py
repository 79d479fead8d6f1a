"""speedk doctor names every op, what it takes here, and why not the others."""

from __future__ import annotations

from speedk.cli import main
from speedk.ops import dispatch, use_backend


def test_every_op_is_told(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for op in dispatch.ops():
        assert lines[op].split()[1] in dispatch.BACKENDS
    assert ("built" in lines["native"]) == (dispatch.native() is not None)


def test_a_forced_backend_that_cannot_run(capsys):
    with use_backend("triton"):
        assert main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["forced"].endswith("triton")
    assert "nothing" in lines["sparsify"] and "there is no triton kernel of sparsify" in lines["sparsify"]
