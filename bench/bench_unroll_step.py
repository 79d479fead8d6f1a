"""The update of an unrolled training step and its adjoint, at the size of the students' ConvNet."""

import torch
from measuring import DEVICE

from speedk.ops import unroll_step, unroll_step_adjoint
from speedk.ops.unroll_step import unroll_step_adjoint_reference, unroll_step_reference

P = 320_010


def bench_unroll_step(contest):
    theta, m, gradient = torch.randn(3, P, device=DEVICE).unbind()
    lr = torch.tensor(0.01, device=DEVICE)
    for name, ours, reference, passes in (
            ("unroll_step", unroll_step, unroll_step_reference, 5),
            ("unroll_step_adjoint", unroll_step_adjoint, unroll_step_adjoint_reference, 5)):
        contest(name, f"P={P}", {"speedk": lambda f=ours: f(theta, m, gradient, lr, 0.9)},
                {"eager": lambda f=reference: f(theta, m, gradient, lr, 0.9)}, moved=4 * passes * P)
