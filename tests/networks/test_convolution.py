"""The students' convolution against PyTorch's, to its second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from speedk.networks import _convolution
from speedk.networks._convolution import Convolution
from speedk.ops import norm_act_pool

CASES = {"padded": (3, 5, 3, 1, 1, (2, 3, 6, 6)), "strided": (2, 4, 3, 2, 1, (3, 2, 7, 5)),
         "pointwise": (4, 2, 1, 2, 0, (2, 4, 5, 5)), "one plane": (1, 2, 3, 1, 1, (1, 1, 3, 4)),
         "unpadded": (2, 3, 3, 1, 0, (2, 2, 5, 4)), "padded far": (2, 3, 1, 1, 1, (2, 2, 3, 4)),
         "many channels": (17, 2, 3, 1, 1, (1, 17, 3, 3))}  # fmt: skip


@pytest.fixture(params=["as on the CPU", "as on a GPU"])
def either_way(request, monkeypatch):
    """Where the gradient in images is computed as on the other device, too."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(_convolution, "AS_A_CONVOLUTION", {"cpu", "cuda"})


def case(name, dtype=torch.float64):
    c_in, c_out, kernel, stride, padding, shape = CASES[name]
    module = Convolution(c_in, c_out, kernel, stride, padding).to(dtype)
    return module, [t.detach().requires_grad_() for t in (torch.randn(shape, dtype=dtype), *module.parameters())]


def ours(module, x, weight, bias):
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, either_way):
    module, leaves = case(name)
    theirs = lambda *a: F.conv2d(*a, module.stride, module.padding)  # noqa: E731
    results = []
    for function in (lambda *a: ours(module, *a), theirs):
        torch.manual_seed(0)
        out = function(*leaves)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in first), leaves)
        results.append([out, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda *a: ours(module, *a), leaves)


@pytest.mark.parametrize(("name", "runs"), [("padded", 0), ("one plane", 0), ("unpadded", 0), ("strided", 1),
                                            ("padded far", 1), ("many channels", 1)])
def test_the_gradient_of_few_channels_is_a_convolution(name, runs, monkeypatch):
    monkeypatch.setattr(_convolution, "AS_A_CONVOLUTION", {"cpu"})
    calls, backward = [], _convolution._backward
    monkeypatch.setattr(_convolution, "_backward", lambda *a: calls.append(a[-1]) or backward(*a))
    module, (x, weight, bias) = case(name)
    out = ours(module, x, weight, bias)
    d_x, = torch.autograd.grad(out.square().sum(), x)
    assert calls.count([True, False, False]) == runs
    torch.testing.assert_close(d_x, torch.nn.grad.conv2d_input(x.shape, weight, 2 * out, module.stride, module.padding),
                               rtol=1e-12, atol=1e-12)


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_products_in_bf16(name, either_way):
    """Operands and results of every product are rounded to 8 bits, and nothing is kept in them: float64 of the rounded
    operands agrees to that, to the second derivatives."""
    module, leaves = case(name, torch.float32)
    module.precision = torch.bfloat16
    exact = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    theirs = lambda *a: F.conv2d(*a, module.stride, module.padding)  # noqa: E731
    results = []
    for function, inputs in ((lambda *a: ours(module, *a), leaves), (theirs, exact)):
        torch.manual_seed(0)
        out = function(*inputs)
        slope = torch.randn(out.shape).to(out.dtype)
        first = torch.autograd.grad(out, inputs, slope, create_graph=True)
        second = torch.autograd.grad(sum((g * torch.randn(g.shape).to(g.dtype)).sum() for g in first), inputs[:2])
        results.append([out, *first, *second])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32 and apart(a.double(), b) < 0.01
    assert apart(results[0][0].double(), results[1][0]) > 1e-5
    with torch.no_grad():
        assert torch.equal(module(leaves[0]), results[0][0])


def test_the_gradient_of_the_input_is_left_out(monkeypatch):
    module, (x, weight, bias) = case("padded")
    loss = ours(module, x, weight, bias).square().sum()
    d_weight, = torch.autograd.grad(loss, weight, create_graph=True)

    def fail(*_):
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr(_convolution._InputGradient, "forward", staticmethod(fail))
        again, = torch.autograd.grad(loss, weight, create_graph=True)
        assert torch.equal(again, d_weight)
        with pytest.raises(AssertionError, match="computed"):
            torch.autograd.grad(loss, x, retain_graph=True)
    d_x, = torch.autograd.grad(again.square().sum(), x)
    assert d_x.abs().max() > 0


def test_elsewhere():
    """Where PyTorch's own is taken: transforms, autocast, compilation; and without gradients."""
    module, (x, weight, bias) = case("padded", torch.float32)
    want = F.conv2d(x, weight, bias, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(module(x), want)
    torch.testing.assert_close(torch.func.vmap(lambda one: module(one[None])[0])(x), want)
    _, tangent = torch.func.jvp(module, (x,), (x,))
    torch.testing.assert_close(tangent, want - bias[:, None, None])
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bias_that_a_norm_takes_away(dtype):
    """Left out, it changes nothing, to the second derivatives; its own are exact zeros, not rounding."""
    module, (x, *parameters) = case("padded", dtype)
    norm = [t.to(dtype).requires_grad_() for t in (torch.rand(module.out_channels) + 0.5,
                                                   torch.randn(module.out_channels))]
    leaves, results = [x, *parameters, *norm], []
    for add_bias in (True, False):
        torch.manual_seed(0)
        convolved = torch.func.functional_call(module, dict(zip(("weight", "bias"), parameters, strict=True)), (x,),
                                               {"add_bias": add_bias})
        out = norm_act_pool(convolved, *norm)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in first), leaves,
                                     materialize_grads=True)
        results.append([out, *first, *second])
        if not add_bias:
            assert not first[2].any() and not second[2].any()
            with torch.no_grad():
                torch.testing.assert_close(module(x, add_bias=False) + module.bias[:, None, None], module(x))
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    for with_it, without in zip(*results, strict=True):
        torch.testing.assert_close(without, with_it, rtol=bound, atol=bound)
