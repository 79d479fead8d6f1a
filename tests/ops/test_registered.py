"""The short way past the dispatcher: taken where nothing there has a say, to the same results, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from support import DEVICES, built
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from speedk.ops import norm_act_pool, registered, sparsify, unroll_step, unroll_step_adjoint
from speedk.ops.norm_act_pool import _norm_act_pool
from speedk.ops.unroll_step import _unroll_step, _unroll_step_adjoint

pytestmark = built


class Dispatched(Exception):
    pass


@pytest.fixture
def no_dispatcher(monkeypatch):
    def called(*_):
        raise Dispatched

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", called)


def inputs(device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 6, 6), (3,), (3,)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


def twice_differentiated(x, weight, bias):
    out = norm_act_pool(x, weight, bias)
    first = torch.autograd.grad(out.square().sum(), (x, weight, bias), create_graph=True)
    return out, *first, *torch.autograd.grad(sum(d.square().sum() for d in first), (x, weight))


def vectors(device="cpu"):
    g = torch.Generator().manual_seed(1)
    return *torch.randn(3, 9, generator=g).to(device).unbind(), torch.tensor(0.3, device=device)


def takes_the_short_way_to_the_same_bits(results, monkeypatch):
    """The tensors of `results()` by way of the dispatcher, and again where whoever calls it is refused."""
    with monkeypatch.context() as patched:
        patched.setattr(registered, "_plain", lambda arguments: False)
        want = results()

    def called(op, *_):
        raise Dispatched(op)

    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", called)
    for a, b in zip(results(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_plain_calls_take_the_short_way_to_the_same_bits(device, monkeypatch):
    def results():
        stepped = [t.clone().requires_grad_() for t in vectors(device)]
        theta, m = unroll_step(*stepped, 0.9)
        return (*twice_differentiated(*inputs(device)), theta, m, *torch.autograd.grad((theta * m).sum(), stepped),
                *unroll_step_adjoint(*vectors(device), 0.9), sparsify(inputs(device)[0], 4))

    takes_the_short_way_to_the_same_bits(results, monkeypatch)


def test_lists_take_the_short_way_to_the_same_bits(monkeypatch):
    """Two lists, one of them empty and one that gets no gradient, between arguments that are none."""
    @registered.custom_op("speedk_test::scaled_sum")
    def scaled_sum(x: torch.Tensor, scales: list[torch.Tensor], by: float, fixed: list[torch.Tensor]) -> torch.Tensor:
        return x * by * sum(scales) + (sum(fixed) if fixed else 0)

    def save(ctx, inputs, output):
        x, scales, ctx.by, fixed = inputs
        ctx.fixed = len(fixed)
        ctx.save_for_backward(x, *scales)

    def backward(ctx, d):
        x, *scales = ctx.saved_tensors
        return d * ctx.by * sum(scales), [(d * ctx.by * x).clone() for _ in scales], None, [None] * ctx.fixed

    scaled_sum.register_fake(lambda x, scales, by, fixed: torch.empty_like(x))
    scaled_sum.register_autograd(backward, setup_context=save)
    x, *rest = (t.requires_grad_() for t in vectors()[:3])

    def results():
        plain = scaled_sum(x.detach(), [t.detach() for t in rest], 2.0, [])
        return (plain, *torch.autograd.grad(scaled_sum(x, rest, 2.0, []).sum(), [x, *rest]),
                *torch.autograd.grad(scaled_sum(x, rest[:1], 2.0, [rest[1].detach()]).sum(), [x, rest[0]]))

    takes_the_short_way_to_the_same_bits(results, monkeypatch)
    with pytest.raises(Dispatched):
        scaled_sum(x, tuple(rest), 2.0, [])


def test_who_has_a_say_is_asked(no_dispatcher):
    x, weight, bias = (t.detach() for t in inputs())
    arguments = x, weight, bias, 1e-5, "native"
    _norm_act_pool(*arguments)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        pass

    def transformed(x):
        with pytest.raises(Dispatched):
            _norm_act_pool(x, *arguments[1:])
        return x.sum()

    for context in (Seen(), FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"), forward_ad.dual_level(),
                    torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])):
        with context, pytest.raises(Dispatched):
            _norm_act_pool(*arguments)
    torch.func.grad(transformed)(x)
    torch.func.vmap(transformed)(x[None])
    torch.jit.trace(transformed, x, check_trace=False)
    with torch.inference_mode():
        made_inside = x * 1
    for other in (torch._neg_view(x), x.to("meta"), x.as_subclass(Mine), made_inside, FakeTensorMode().from_tensor(x)):
        with pytest.raises(Dispatched):
            _norm_act_pool(other, *arguments[1:])


def test_who_is_not_differentiable_is_told_so(no_dispatcher):
    @registered.custom_op("speedk_test::doubled")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    x = torch.ones(3)
    assert torch.equal(doubled(x), 2 * x)
    with pytest.raises(Dispatched):
        doubled(x.requires_grad_())


def test_what_is_asked_is_right():
    x, weight, bias = (t.detach() for t in inputs())
    want = norm_act_pool(-x, weight, bias)
    assert torch.equal(norm_act_pool(torch._neg_view(x), weight, bias), want)
    torch._dynamo.reset()
    compiled = torch.compile(norm_act_pool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(-x, weight, bias), want)
    *tensors, lr = vectors()
    with pytest.raises(RuntimeError, match="unroll_step_adjoint .*is differentiable once .*use_backend"):
        _unroll_step_adjoint(tensors[0].requires_grad_(), *tensors[1:], lr, 0.9, "native")[0].sum().backward()
    theta, _ = _unroll_step(*tensors, lr, 0.9, "native")
    batch = torch.autograd.grad(theta, tensors[0], torch.eye(9), is_grads_batched=True)[0]
    assert torch.equal(batch, torch.eye(9))


def test_without_torchs_own_names_every_call_goes_the_long_way(no_dispatcher, monkeypatch):
    x, weight, bias = inputs()
    _norm_act_pool(x, weight, bias, 1e-5, "native")
    monkeypatch.setattr(registered, "_SHORT", False)
    with pytest.raises(Dispatched):
        _norm_act_pool(x, weight, bias, 1e-5, "native")
