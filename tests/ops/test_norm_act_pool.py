"""norm_act_pool on every backend: against loops in float64, and its derivatives against PyTorch's."""

import forms
import pytest
import torch
from support import LAYOUTS, assert_matches, built, compiles, on_backends, poisoned_memory, strided
from torch.nn.functional import avg_pool2d, instance_norm, relu

from speedk.ops import norm_act_pool
from speedk.ops.dispatch import use_backend
from speedk.ops.norm_act_pool import (
    _norm_act_pool,
    _norm_act_pool_bwd,
    _norm_act_pool_bwd_bwd,
)

SHAPES = [(2, 3, 8, 8), (1, 1, 7, 5), (3, 5, 2, 2), (2, 3, 2, 3), (1, 2, 33, 70), (1, 1, 4, 1030), (0, 2, 4, 4)]
# Enough channels for vectors, with some left over, and for the largest error of either side to tell something.
CHANNELS = [(2, 37, 7, 6), (1, 83, 3, 5), (2, 48, 16, 16), (2, 24, 33, 70), (1, 32, 4, 1030)]
CASES = [*((s, torch.float64) for s in SHAPES + CHANNELS), *((s, torch.float32) for s in CHANNELS)]
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
NAMES = ("out", "d_x", "d_weight", "d_bias", "d of d_out", "second d_x", "second d_weight")


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
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_values_and_derivatives(shape, dtype, layout, backend):
    torch.manual_seed(0)
    leaves = inputs(shape, dtype)
    d_out = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=dtype)
    slopes = [torch.randn_like(t) for t in leaves]

    def run(function, dtype, layout):
        x, weight, bias = (t.to(dtype, copy=True) for t in leaves)
        x = [t.requires_grad_() for t in (x.contiguous(memory_format=FORMATS[layout]), weight, bias)]
        d = d_out.to(dtype, copy=True).requires_grad_()
        out = function(*x)
        first = torch.autograd.grad(out, x, d, create_graph=True)
        second = torch.autograd.grad(first, (d, x[0], x[1]), [t.to(dtype) for t in slopes])
        return [t.detach() for t in (out, *first, *second)]

    with use_backend(backend), poisoned_memory():
        got = run(norm_act_pool, dtype, layout)
    library, exact = (run(forms.norm_act_pool, t, layout) for t in (dtype, torch.float64))
    torch.testing.assert_close(exact[0], by_loops(*leaves), rtol=1e-9, atol=1e-9)
    for name, *triple in zip(NAMES, got, library, exact, strict=True):
        if dtype == torch.float64:  # where the truth is no better than what is measured
            torch.testing.assert_close(triple[0], triple[2], rtol=1e-11, atol=1e-11)
        else:
            assert_matches(name, *triple)


@built
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("spread", [0.1, 0.01, 0])
def test_planes_far_from_zero(spread, layout):
    """As exact as PyTorch's instance_norm, which sums in float64, up to planes that hold one value alone."""
    torch.manual_seed(0)
    offset = 10 if spread else torch.rand(1, 40, 1, 1) * 200 - 100
    x = offset + spread * torch.randn(1, 40, 128, 128)
    leaves = x, torch.rand(40) + 0.5, torch.full((40,), 12.0)  # no value at the ReLU's kink, where rounding decides
    d_out, slopes = torch.randn(1, 40, 64, 64), [torch.randn_like(t) for t in leaves]

    def by_instance_norm(x, weight, bias):
        return avg_pool2d(relu(instance_norm(x, weight=weight, bias=bias)), 2)

    def run(function, dtype, layout):
        x, weight, bias, d = (t.to(dtype, copy=True) for t in (*leaves, d_out))
        x = [t.requires_grad_() for t in (x.contiguous(memory_format=FORMATS[layout]), weight, bias)]
        out = function(*x)
        first = torch.autograd.grad(out, x, d.requires_grad_(), create_graph=True)
        second = torch.autograd.grad(first, (d, *x[:2]), [t.to(dtype) for t in slopes])
        return [t.detach() for t in (out, *first, *second)]

    with use_backend("native"):
        got = run(norm_act_pool, torch.float32, layout)
    library, exact = run(by_instance_norm, torch.float32, "contiguous"), run(forms.norm_act_pool, torch.float64, layout)
    for name, *triple in zip(NAMES, got, library, exact, strict=True):
        assert_matches(name, *triple)


def twin(dd_x, dd_weight, dd_bias, d_out, x, weight, bias, eps=1e-5):
    """The adjoint of the backward pass as docs/math/norm_act_pool.md derives it."""
    rows, columns = (size // 2 * 2 for size in x.shape[2:])
    mean, rstd = x.mean((2, 3), keepdim=True), torch.rsqrt(x.var((2, 3), correction=0, keepdim=True) + eps)
    w, b, p, q = (t[:, None, None] for t in (weight, bias, dd_weight, dd_bias))
    n = (x - mean) * rstd
    open = w * n + b > 0
    g = torch.zeros_like(x)
    g[..., :rows, :columns] = d_out.repeat_interleave(2, -2).repeat_interleave(2, -1) / 4
    g = g * open
    G, N, U, V = (t.mean((2, 3), keepdim=True) for t in (g, g * n, dd_x, dd_x * n))
    k = (dd_x * g).mean((2, 3), keepdim=True) - U * G - V * N
    d_g = w * rstd * (dd_x - U - n * V) + p * n + q
    d_x = rstd * ((p - w * rstd * V) * (g - G) - w * rstd * N * (dd_x - U) - n * (p * N + w * rstd * (k - 2 * V * N)))
    d_weight = (x.shape[2] * x.shape[3] * rstd * k).sum((0, 2, 3))
    return torch.nn.functional.avg_pool2d(open * d_g, 2), d_x, d_weight


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 5, 7, 5), (1, 2, 2, 3)], ids=str)
def test_the_derivation(shape):
    """Against PyTorch's own differentiation of its backward pass, in float64."""
    leaves = [t.requires_grad_() for t in inputs(shape)]
    d_out = torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=torch.float64, requires_grad=True)
    slopes = [torch.randn_like(t) for t in leaves]
    first = torch.autograd.grad(forms.norm_act_pool(*leaves), leaves, d_out, create_graph=True)
    want = torch.autograd.grad(first, (d_out, *leaves), slopes, materialize_grads=True)
    assert not want[3].any(), "the bias moves the kinks alone"
    for got, exact in zip(twin(*slopes, d_out, *leaves), want, strict=False):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


@on_backends("norm_act_pool")
def test_a_third_derivative_is_right_or_refused(backend):
    leaves = [t.requires_grad_() for t in inputs((1, 2, 4, 4))]

    def derivative(out):
        return torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]

    with use_backend(backend):
        second = derivative(derivative(norm_act_pool(*leaves)))
        if backend == "torch":
            assert derivative(second).any()
        else:
            with pytest.raises(RuntimeError, match="differentiable twice"):
                derivative(second)


@built
@pytest.mark.parametrize("layout", FORMATS)
def test_layout_is_kept(layout):
    x, weight, bias = inputs((3, 4, 6, 6), torch.float32)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    with use_backend("native"):
        out = norm_act_pool(x, weight, bias)
        d_x, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        second, = torch.autograd.grad(d_x.sum(), x)
    for tensor in (out, d_x, second):
        assert tensor.is_contiguous(memory_format=FORMATS[layout])


@on_backends("norm_act_pool")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    x, weight, bias = inputs((3, 4, 6, 6), torch.float32)
    x = strided(x, layout)
    with use_backend(backend):
        got = norm_act_pool(x, weight, bias)
    torch.testing.assert_close(got, forms.norm_act_pool(x.contiguous(), weight, bias))


@on_backends("norm_act_pool")
@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (1, 3, 2, 2)], ids=str)
def test_differentiates_twice(shape, backend):
    leaves = [t.requires_grad_() for t in inputs(shape)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(norm_act_pool, leaves)
        assert torch.autograd.gradgradcheck(norm_act_pool, leaves)


@built
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_opcheck(layout):
    def laid_out(*shape):
        t = torch.randn(shape)
        t = t.contiguous(memory_format=torch.channels_last) if layout == "channels last" else strided(t, layout)
        return t.detach().requires_grad_()

    _, weight, bias = inputs((3, 2, 4, 4), torch.float32)
    x, dd_x, d_out = laid_out(3, 2, 4, 4), laid_out(3, 2, 4, 4), laid_out(3, 2, 2, 2)
    torch.library.opcheck(_norm_act_pool, (x, weight.requires_grad_(), bias.requires_grad_(), 1e-5, "native"))
    statistics = x.detach().mean((2, 3)), torch.rsqrt(x.detach().var((2, 3), correction=0) + 1e-5)
    rest = (d_out, x, weight, bias, *statistics, 1e-5, "native")
    torch.library.opcheck(_norm_act_pool_bwd, rest)
    slopes = dd_x.detach(), torch.randn(2), torch.randn(2)
    inert = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in rest)  # its derivative is refused
    torch.library.opcheck(_norm_act_pool_bwd_bwd, (*slopes, *inert))


@on_backends("norm_act_pool")
def test_compile(backend):
    with use_backend(backend):
        compiles(lambda *x: norm_act_pool(*x), *inputs((2, 3, 4, 4), torch.float32))


def test_under_torch_func():
    x, weight, bias = inputs((3, 2, 4, 4))
    loss = lambda image: norm_act_pool(image[None], weight, bias).pow(2).sum()  # noqa: E731
    want = torch.func.vmap(torch.func.grad(
        lambda image: forms.norm_act_pool(image[None], weight, bias).pow(2).sum()))(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), want)
    _, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (want[0] * x[1]).sum())


@pytest.mark.parametrize("layout", FORMATS)
def test_threads_do_not_change_a_bit(layout):
    x, weight, bias = inputs((5, 67, 12, 12), torch.float32)
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=FORMATS[layout]), weight, bias)]
    d_out = torch.randn(5, 67, 6, 6, requires_grad=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = norm_act_pool(*leaves)
            first = torch.autograd.grad(out, leaves, d_out, create_graph=True)
            results.append([out, *first, *torch.autograd.grad(first, (d_out, *leaves[:2]), leaves)])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@on_backends("norm_act_pool")
@pytest.mark.parametrize("layout", FORMATS)
def test_a_nan_is_not_lost(layout, backend):
    x, weight, bias = inputs((2, 3, 4, 4), torch.float32)
    x[0, 1, 2, 2] = torch.nan
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    with use_backend(backend):
        out = norm_act_pool(x, weight, bias)
        d_x, = torch.autograd.grad(out.sum(), x, create_graph=True)
        second, = torch.autograd.grad(d_x, x, torch.ones_like(x))
    for tensor in (out, d_x, second):
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
