"""The update of an unrolled training step and its adjoint, at the size of the students' ConvNet."""

import pytest
import torch
from measuring import DEVICE

from speedk.ops import unroll_step, unroll_step_adjoint
from speedk.ops.unroll_step import unroll_step_adjoint_reference, unroll_step_reference

P = 320_010


@pytest.mark.parametrize(("name", "ours", "reference"), [
    ("unroll_step", unroll_step, unroll_step_reference),
    ("unroll_step_adjoint", unroll_step_adjoint, unroll_step_adjoint_reference)], ids=["forward", "adjoint"])
def bench_unroll_step(contest, name, ours, reference):
    theta, m, gradient = torch.randn(3, P, device=DEVICE).unbind()
    given = theta, m, gradient, torch.tensor(0.01, device=DEVICE), 0.9
    contest(name, f"P={P}", {"speedk": lambda: ours(*given)}, {"eager": lambda: reference(*given)}, moved=4 * 5 * P)
