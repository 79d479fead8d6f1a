"""mhsc, forward and with its gradients, against the plain batched product and einsum."""

import pytest
import torch
from cases import DEEP, LARGE, MIDDLE, SMALL

from speedk.ops import mhsc
from speedk.ops.mhsc import mhsc_reference


def einsum(scm, saet):
    n, h, j, k = scm.shape
    return torch.einsum("nhjk,khd->njhd", scm, saet.view(k, h, -1)).reshape(n, j, saet.shape[1])


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("case", [SMALL, MIDDLE, DEEP, LARGE], ids=lambda c: c.name)
def bench_mhsc(contest, case, direction):
    scm, saet = case.scm(), case.saet()
    d_out = torch.randn(case.N, case.J, case.D, device=scm.device)
    moved, flops = 4 * (scm.numel() + d_out.numel()), 2 * case.N * case.J * case.K * case.D
    if direction == "fwd":
        contest("mhsc", case.name, {"speedk": lambda: mhsc(scm, saet)},
                {"matmul": lambda: mhsc_reference(scm, saet), "einsum": lambda: einsum(scm, saet)},
                moved=moved, flops=flops)
        return
    leaves = scm.requires_grad_(), saet.requires_grad_()

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, d_out)

    contest("mhsc fwd+bwd", case.name, {"speedk": both(mhsc)},
            {"matmul": both(mhsc_reference), "einsum": both(einsum)},
            moved=moved + 4 * (2 * scm.numel() + d_out.numel()), flops=3 * flops)
