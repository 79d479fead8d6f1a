"""topk_mask and sparsify against torch.topk and a scatter; the yardstick is a plain copy of the codes."""

import pytest
import torch
from cases import LARGE, MIDDLE

from speedk.ops import sparsify, topk_mask

CASES = pytest.mark.parametrize("case", [MIDDLE, LARGE], ids=lambda c: c.name)


@CASES
def bench_sparsify(contest, case):
    scm = case.scm()

    def library():
        flat = scm.flatten(2)
        at = flat.abs().topk(case.k, dim=-1, sorted=False).indices
        return torch.zeros_like(flat).scatter_(-1, at, flat.gather(-1, at)).view_as(scm)

    contest("sparsify", case.name, {"speedk": lambda: sparsify(scm, case.k, check=False)},
            {"topk + scatter": library}, moved=2 * scm.numel() * scm.element_size(), yardsticks={"copy": scm.clone})


@CASES
def bench_topk_mask(contest, case):
    scm = case.scm()

    def library():
        flat = scm.flatten(2)
        at = flat.abs().topk(case.k, dim=-1, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, at, True).view_as(scm)

    contest("topk_mask", case.name, {"speedk": lambda: topk_mask(scm, case.k, check=False)},
            {"topk + scatter": library}, moved=scm.numel() * (scm.element_size() + 1))


@pytest.mark.parametrize("case", [MIDDLE], ids=lambda c: c.name)
def bench_sparsify_backward(contest, case):
    scm = case.scm().requires_grad_()
    d_kept = torch.randn_like(scm)

    def gradient(function):
        return lambda: torch.autograd.grad(function(scm), scm, d_kept)

    def library(x):
        at = x.detach().flatten(2).abs().topk(case.k, dim=-1, sorted=False).indices
        mask = torch.zeros_like(x.flatten(2)).scatter_(-1, at, 1.0).view_as(x)
        return x * mask

    contest("sparsify fwd+bwd", case.name, {"speedk": gradient(lambda x: sparsify(x, case.k, check=False))},
            {"topk mask, times": gradient(library)}, moved=5 * scm.numel() * scm.element_size())
