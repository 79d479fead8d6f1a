"""unroll_step and its adjoint on every backend: against loops and autograd in float64."""

import forms
import pytest
import torch
from support import DEVICES, LAYOUTS, assert_matches, built, compiles, on_backends, poisoned_memory, strided

from speedk.ops import unroll_step, unroll_step_adjoint
from speedk.ops.dispatch import use_backend
from speedk.ops.unroll_step import _unroll_step, _unroll_step_adjoint

SIZES = [0, 1, 17, 4096, 4097, 40_003]


def inputs(size, dtype=torch.float64, device="cpu"):
    return *(torch.randn(size, dtype=dtype, device=device) for _ in range(3)), torch.tensor(0.3, dtype=dtype).to(device)


def by_loops(theta, m, gradient, lr, momentum):
    after = [momentum * a + (1 - momentum) * g for a, g in zip(m.tolist(), gradient.tolist(), strict=True)]
    moved = [t - lr.item() * a for t, a in zip(theta.tolist(), after, strict=True)]
    return torch.tensor(moved, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)


@on_backends("unroll_step", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_values(size, dtype, momentum, backend, device):
    args = inputs(size, dtype, device)
    with use_backend(backend), poisoned_memory():
        got = unroll_step(*args, momentum)
        got_back = unroll_step_adjoint(*args, momentum)
    exact_args = [t.double() for t in args]
    exact = forms.unroll_step(*exact_args, momentum)
    exact_back = forms.unroll_step_adjoint(*exact_args, momentum)
    for value, looped in zip(exact, by_loops(*exact_args, momentum), strict=True):
        torch.testing.assert_close(value.cpu(), looped, rtol=1e-12, atol=1e-12)
    library = *forms.unroll_step(*args, momentum), *forms.unroll_step_adjoint(*args, momentum)
    names = "theta", "m", "d_gradient", "d_m", "d_lr"
    for name, *triple in zip(names, (*got, *got_back), library, (*exact, *exact_back), strict=True):
        if dtype == torch.float64:  # where the truth is no better than what is measured
            torch.testing.assert_close(triple[0], triple[2], rtol=1e-12, atol=1e-10)
        else:
            assert_matches(name, *triple)


@on_backends("unroll_step")
@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_strides(layout, backend):
    *vectors, lr = inputs(100, torch.float32)
    with use_backend(backend):
        laid_out = [strided(v, layout) for v in vectors]
        for function in (unroll_step, unroll_step_adjoint):
            for got, want in zip(function(*laid_out, lr, 0.9), function(*vectors, lr, 0.9), strict=True):
                assert torch.equal(got, want)


@on_backends("unroll_step")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient(momentum, backend):
    leaves = [t.requires_grad_() for t in inputs(9)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: unroll_step(*x, momentum), leaves)


@on_backends("unroll_step")
def test_without_the_rate(backend):
    d_theta, d_m, m, lr = inputs(50)
    with use_backend(backend):
        d_gradient, d_before, d_lr = unroll_step_adjoint(d_theta, d_m, None, lr, 0.9)
        want = unroll_step_adjoint(d_theta, d_m, m, lr, 0.9)
    assert torch.equal(d_gradient, want[0]) and torch.equal(d_before, want[1]) and d_lr == 0 != want[2]


@built
def test_opcheck():
    args = [t.requires_grad_() for t in inputs(20, torch.float32)]
    torch.library.opcheck(_unroll_step, (*args, 0.9, "native"))
    args = [t.detach() for t in args]
    torch.library.opcheck(_unroll_step_adjoint, (*args, 0.9, "native"))
    torch.library.opcheck(_unroll_step_adjoint, (args[0].expand(20), args[1], None, args[3], 0.9, "native"))


@on_backends("unroll_step")
def test_compile(backend):
    with use_backend(backend):
        for function in (unroll_step, unroll_step_adjoint):
            compiles(lambda *x, f=function: f(*x, 0.9), *inputs(20, torch.float32))


@built
def test_threads_do_not_change_a_bit():
    args = inputs(200_001, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((*unroll_step(*args, 0.9), *unroll_step_adjoint(*args, 0.9)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals():
    theta, m, gradient, lr = inputs(4)
    for message, call in {
        r"must be \[P\] of one P, got m \(3,\)": lambda: unroll_step(theta, m[:3], gradient, lr, 0.9),
        "m is torch.float32": lambda: unroll_step_adjoint(theta, gradient, m.float(), lr, 0.9),
        "lr must be a scalar": lambda: unroll_step(theta, m, gradient, lr[None], 0.9),
        "lr is torch.float32": lambda: unroll_step(theta, m, gradient, lr.float(), 0.9),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
