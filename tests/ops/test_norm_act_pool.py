"""norm_act_pool: against loops in float64, and every backend against the reference."""

import pytest
import torch
from support import LAYOUTS, assert_matches, compiles, on_backends, poisoned_memory, strided

from speedk.ops import norm_act_pool
from speedk.ops.dispatch import use_backend
from speedk.ops.norm_act_pool import _norm_act_pool, _norm_act_pool_bwd, norm_act_pool_reference

SHAPES = [(2, 3, 8, 8), (1, 1, 7, 5), (3, 5, 2, 2), (2, 3, 2, 3), (1, 2, 33, 70), (1, 1, 4, 1030), (0, 2, 4, 4)]


def inputs(shape, dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    return x, torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)


def by_loops(x, weight, bias):
    b, c, h, w = x.shape
    out = torch.empty(b, c, h // 2, w // 2, dtype=torch.float64)
    for i in range(b):
        for j in range(c):
            plane = x[i, j].double()
            mean = plane.sum() / plane.numel()
            variance = ((plane - mean) ** 2).sum() / plane.numel()
            plane = ((plane - mean) / (variance + 1e-5) ** 0.5 * weight[j].double() + bias[j].double()).clamp(min=0)
            for r in range(h // 2):
                for s in range(w // 2):
                    out[i, j, r, s] = plane[2 * r:2 * r + 2, 2 * s:2 * s + 2].sum() / 4
    return out


@on_backends("norm_act_pool")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, backend):
    leaves = inputs(shape, dtype)
    d_out = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=dtype)

    def run(function, dtype):
        x = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        out = function(*x)
        return [out.detach(), *torch.autograd.grad(out, x, d_out.to(dtype))]

    with use_backend(backend), poisoned_memory():
        got = run(norm_act_pool, dtype)
    library, exact = (run(lambda *x: norm_act_pool_reference(*x, 1e-5), t) for t in (dtype, torch.float64))
    torch.testing.assert_close(exact[0], by_loops(*leaves), rtol=1e-9, atol=1e-9)
    for name, *triple in zip(("out", "d_x", "d_weight", "d_bias"), got, library, exact, strict=True):
        if dtype == torch.float64:  # where the reference is no better than the kernel
            torch.testing.assert_close(triple[0], triple[2], rtol=1e-12, atol=1e-12)
        else:
            assert_matches(name, *triple)


@on_backends("norm_act_pool")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    x, weight, bias = inputs((3, 4, 6, 6), torch.float32)
    x = strided(x, layout)
    with use_backend(backend):
        got = norm_act_pool(x, weight, bias)
    torch.testing.assert_close(got, norm_act_pool_reference(x.contiguous(), weight, bias, 1e-5))


@on_backends("norm_act_pool")
@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (1, 3, 2, 2)], ids=str)
def test_differentiates_twice(shape, backend):
    leaves = [t.requires_grad_() for t in inputs(shape)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(norm_act_pool, leaves)
        assert torch.autograd.gradgradcheck(norm_act_pool, leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, weight, bias = inputs((3, 2, 4, 4), torch.float32)
    x = strided(x, layout).detach().requires_grad_()
    torch.library.opcheck(_norm_act_pool, (x, weight.requires_grad_(), bias.requires_grad_(), 1e-5, "native"))
    d_out = strided(torch.randn(3, 2, 2, 2), layout).requires_grad_()
    statistics = x.detach().mean((2, 3)), torch.rsqrt(x.detach().var((2, 3), correction=0) + 1e-5)
    torch.library.opcheck(_norm_act_pool_bwd, (d_out, x, weight, bias, *statistics, 1e-5, "native"))


@on_backends("norm_act_pool")
def test_compile(backend):
    with use_backend(backend):
        compiles(lambda *x: norm_act_pool(*x), *inputs((2, 3, 4, 4), torch.float32))


def test_under_torch_func():
    x, weight, bias = inputs((3, 2, 4, 4))
    loss = lambda image: norm_act_pool(image[None], weight, bias).pow(2).sum()  # noqa: E731
    want = torch.func.vmap(torch.func.grad(
        lambda image: norm_act_pool_reference(image[None], weight, bias, 1e-5).pow(2).sum()))(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), want)
    _, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (want[0] * x[1]).sum())


def test_threads_do_not_change_a_bit():
    args = inputs((5, 7, 12, 12), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(norm_act_pool(*args))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@on_backends("norm_act_pool")
def test_a_nan_is_not_lost(backend):
    x, weight, bias = inputs((2, 3, 4, 4), torch.float32)
    x[0, 1, 2, 2] = torch.nan
    x.requires_grad_()
    with use_backend(backend):
        out = norm_act_pool(x, weight, bias)
    d_x, = torch.autograd.grad(out, x, torch.ones_like(out))
    for tensor in (out, d_x):
        assert tensor[0, 1].isnan().all() and tensor.isnan().sum() == tensor[0, 1].numel()


def test_refusals():
    x, weight, bias = inputs((2, 3, 4, 4))
    for message, call in {
        r"must be \[B, C, H, W\]": lambda: norm_act_pool(x[0], weight, bias),
        "at least 2": lambda: norm_act_pool(x[..., :1], weight, bias),
        r"must be \[3\], got \(2,\)": lambda: norm_act_pool(x, weight[:2], bias),
        "weight is torch.float32": lambda: norm_act_pool(x, weight.float(), bias),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
