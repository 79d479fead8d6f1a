"""The stored form: encode against torch.topk, decode against scatter and torch.sparse, decode and combine in one.

The yardstick of decoding, `fill`, is `torch.zeros` of the same tensor, in the same run: what its memory costs alone.
"""

import pytest
import torch
from cases import LARGE, MIDDLE
from measuring import DEVICE

from speedk.ops import coo_decode, coo_encode, mhsc_coo

CASES = pytest.mark.parametrize("case", [MIDDLE, LARGE], ids=lambda c: c.name)


def scattered(case, values, rows, cols):
    at = rows.long() * case.K + cols.long()
    dense = torch.zeros(case.N, case.H, case.J * case.K, device=DEVICE)
    return dense.scatter_add_(-1, at, values).view(case.N, case.H, case.J, case.K)


def heads(case, scm, saet):
    pools = saet.view(case.K, case.H, -1).transpose(0, 1)
    return (scm @ pools).transpose(1, 2).reshape(case.N, case.J, case.D)


@CASES
def bench_encode(contest, case):
    scm = case.scm()

    def library():
        flat = scm.flatten(2)
        at = flat.abs().topk(case.k, dim=-1, sorted=False).indices.sort(-1).values
        return flat.gather(-1, at), (at // case.K).to(torch.uint8), (at % case.K).to(torch.uint8)

    contest("coo_encode", case.name, {"speedk": lambda: coo_encode(scm, case.k, check=False)},
            {"topk + sort + gather": library}, moved=scm.numel() * 4)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@CASES
def bench_decode(contest, case, direction):
    stored = case.entries()

    def sparse():
        n, h, k = stored[0].shape
        matrix = torch.arange(n * h, device=DEVICE).repeat_interleave(k)
        at = torch.stack([matrix, stored[1].long().flatten(), stored[2].long().flatten()])
        full = torch.sparse_coo_tensor(at, stored[0].flatten(), (n * h, case.J, case.K), is_coalesced=True)
        return full.to_dense().view(n, h, case.J, case.K)

    shape = (case.N, case.H, case.J, case.K)
    if direction == "fwd":
        contest("coo_decode", case.name, {"speedk": lambda: coo_decode(*stored, case.J, case.K, check=False)},
                {"zeros + scatter_add": lambda: scattered(case, *stored), "torch.sparse": sparse},
                moved=4 * case.N * case.H * case.J * case.K,
                yardsticks={"fill": lambda: torch.zeros(shape, device=DEVICE)})
        return
    values, d_dense = stored[0].requires_grad_(), torch.randn(shape, device=DEVICE)

    def gradient(function):
        return lambda: torch.autograd.grad(function(values, *stored[1:]), values, d_dense)

    contest("coo_decode fwd+bwd", case.name,
            {"speedk": gradient(lambda *stored: coo_decode(*stored, case.J, case.K, check=False))},
            {"zeros + scatter_add": gradient(lambda *stored: scattered(case, *stored))},
            moved=4 * case.N * case.H * case.J * case.K)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@CASES
def bench_mhsc_coo(contest, case, direction):
    stored, saet = case.entries(), case.saet()
    least = 4 * case.N * case.J * case.D + 6 * stored[0].numel()
    if direction == "fwd":
        contest("mhsc_coo", case.name, {"speedk": lambda: mhsc_coo(*stored, saet, case.J, check=False)},
                {"scatter_add + matmul": lambda: heads(case, scattered(case, *stored), saet)}, moved=least,
                flops=2 * stored[0].numel() * case.D // case.H)
        return
    leaves = stored[0].requires_grad_(), saet.requires_grad_()
    d_out = torch.randn(case.N, case.J, case.D, device=DEVICE)

    def both(function):
        return lambda: torch.autograd.grad(function(leaves[0], *stored[1:], saet), leaves, d_out)

    contest("mhsc_coo fwd+bwd", case.name, {"speedk": both(lambda *given: mhsc_coo(*given, case.J, check=False))},
            {"scatter_add + matmul": both(lambda *given: heads(case, scattered(case, *given[:3]), given[3]))},
            moved=2 * least, flops=6 * stored[0].numel() * case.D // case.H)
