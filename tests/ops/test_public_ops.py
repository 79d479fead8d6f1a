"""What holds for every public op alike: `explain`, one dtype and device, autocast, tensors without values, transforms,
batches of gradients, half precision and tracing."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import built, compiles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from speedk import ops
from speedk.ops import BlockWeights, FReeNetWeights, dispatch, explain, native, use_backend

N, H, J, K, D, C, P = 2, 3, 4, 5, 6, 3, 2


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape)))


SCM, SAET, STATE, LAST = draw(N, H, J, K), draw(K, D), draw(N, J, D), (draw(P * P * C, D), draw(P * P * C))
STORED = (draw(N, H, 2), *(torch.tensor([[[0, 3]]], dtype=torch.uint8).expand(N, H, 2) for _ in range(2)))
BLOCK = BlockWeights(*(draw(D, D, seed=i) / 3 if i in (0, 4, 6) else draw(D, seed=i) / 4 + (i in (2, 8))
                       for i in range(10)))  # fmt: skip
NET = FReeNetWeights((BLOCK, BLOCK), *LAST, channels=C, patch=P, patches=J)
VECTORS = [draw(7, seed=i) for i in range(3)]

CASES = {
    "mhsc": (SCM, SAET),
    "sparsify": (SCM, 7),
    "topk_mask": (SCM, 7),
    "coo_encode": (SCM, 7),
    "coo_decode": (*STORED, J, K),
    "mhsc_coo": (*STORED, SAET, J),
    "patchify": (draw(N, C, 4, 6), P),
    "unpatchify": (draw(N, J, P * P * C), C, P),
    "tokens_to_images": (STATE, *LAST, C, P),
    "add_layer_norm": (STATE, draw(N, J, D, seed=1), draw(D), draw(D, seed=1), 1e-3),
    "norm_act_pool": (draw(N, C, 5, 4), draw(C), draw(C, seed=1)),
    "freenet_block": (STATE, draw(N, J, D, seed=1), BLOCK, "sum"),
    "freenet": (SCM, SAET, NET),
    "freenet_coo": (*STORED, SAET, NET),
    "unroll_step": (*VECTORS, torch.tensor(0.1), 0.9),
    "unroll_step_adjoint": (*VECTORS, torch.tensor(0.1), 0.9),
}
DIFFERENTIABLE = [name for name in CASES if name not in ("topk_mask", "unroll_step_adjoint")]


def leaves(name: str) -> tuple[list[torch.Tensor], object]:
    """The floating tensors of an op's arguments, and a function of them that is its floating results in one row."""
    flat, spec = tree_flatten(CASES[name])
    places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        arguments = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            arguments[i] = tensor
        out = getattr(ops, name)(*tree_unflatten(arguments, spec))
        parts = [part for part in (out if isinstance(out, tuple) else (out,)) if part.is_floating_point()]
        return torch.cat([part.flatten() for part in parts])

    return [flat[i] for i in places], call


def backends(names: list[str]) -> pytest.MarkDecorator:
    """Each op of `names` on the CPU's backends that it has here."""
    found = [(name, b) for name in names for b in ("native", "torch") if dispatch.installed(name, "cpu")[b] in
             ("chosen", "available")]  # fmt: skip
    return pytest.mark.parametrize(("name", "backend"), found)


def test_every_op_is_here():
    assert set(CASES) == set(dispatch.ops()) == set(dispatch._public) <= set(ops.__all__)


@pytest.mark.parametrize("name", CASES)
def test_explain_takes_the_arguments_of_the_op(name):
    found = explain(name, *CASES[name])
    assert list(found) == list(dispatch._ops[name].order) and list(found.values()).count("chosen") == 1
    assert sorted(found) == sorted(dispatch.BACKENDS)
    native = dispatch.installed(name, "cpu")["native"] in ("chosen", "available")
    assert found["native" if native else "torch"] == "chosen"
    with use_backend("torch"):
        assert explain(name, *CASES[name])["torch"] == "chosen"
    assert set(explain(name)) == set(found)


def test_explain_refuses_what_the_op_refuses_and_takes_its_keywords():
    with pytest.raises(ValueError, match="D=5 is not a multiple of H=3"):
        explain("freenet", SCM, draw(K, 5), NET)
    with pytest.raises(TypeError):
        explain("mhsc", SCM)
    assert explain("sparsify", SCM, k=7, check=False) == explain("sparsify", SCM, 7)
    assert "torch.float16" in explain("mhsc", SCM.half(), saet=SAET.half())["native"]
    assert explain("freenet_block", STATE, None, BLOCK)["torch"] == "chosen"


@pytest.mark.parametrize("name", CASES)
def test_one_dtype_and_one_device(name):
    flat, spec = tree_flatten(CASES[name])
    places = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]
    floats = [i for i in places if flat[i].is_floating_point()]
    for i in places if len(places) > 1 else []:
        other = [*flat[:i], flat[i].to("meta"), *flat[i + 1:]]
        with pytest.raises(ValueError, match="is on .* but .* is on"):
            getattr(ops, name)(*tree_unflatten(other, spec))
    for i in floats if len(floats) > 1 else []:
        other = [*flat[:i], flat[i].half(), *flat[i + 1:]]
        with pytest.raises(ValueError, match=r"is torch\.float\d\d but .* is torch\.float\d\d"):
            getattr(ops, name)(*tree_unflatten(other, spec))


@backends(list(CASES))
def test_autocast_takes_the_widest_dtype(name, backend):
    """A result of autocast (bfloat16 here) meets float32 parameters: as PyTorch's own sums and norms, in float32."""
    narrow = CASES[name][0].bfloat16()
    wide = (narrow.float(), *CASES[name][1:])
    with use_backend(backend):
        want = tree_flatten(getattr(ops, name)(*wide))[0]
        with torch.autocast("cpu", torch.bfloat16):
            given = (narrow, *CASES[name][1:]) if len(leaves(name)[0]) > 1 else wide
            got = tree_flatten(getattr(ops, name)(*given))[0]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@backends(["mhsc_coo"])
def test_autocast_of_keywords_in_any_order(name, backend):
    """The first tensor may be one of indices, which autocast leaves alone."""
    values, rows, cols = STORED
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        got = ops.mhsc_coo(rows=rows, cols=cols, J=J, values=values, saet=SAET)
    with use_backend(backend):
        assert torch.equal(got, ops.mhsc_coo(values, rows, cols, SAET, J)) and got.dtype == torch.float32


def test_autocast_traces():
    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.mhsc(torch.nn.functional.linear(x, SAET[:, :K]), SAET)

    assert step(SCM).dtype == torch.float32
    compiles(step, SCM)


@pytest.mark.parametrize("name", CASES)
def test_tensors_without_values(name):
    """On the meta device and in FakeTensorMode there is nothing to look at: the same shapes and dtypes, no check."""
    want = [(t.shape, t.dtype) for t in tree_flatten(getattr(ops, name)(*CASES[name]))[0]]
    meta = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, CASES[name])
    assert [(t.shape, t.dtype) for t in tree_flatten(getattr(ops, name)(*meta))[0]] == want
    with FakeTensorMode() as mode:
        fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, CASES[name])
        for backend in ("torch", None):
            with use_backend(backend):
                assert [(t.shape, t.dtype) for t in tree_flatten(getattr(ops, name)(*fake))[0]] == want


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "unroll_step_adjoint"])
def test_transforms(name):
    """In float32, which the kernels take elsewhere: vmap, and both ways of differentiating, by <J u, v> = <u, J' v>."""
    tensors, call = leaves(name)
    slopes = [draw(*t.shape, seed=40 + i) for i, t in enumerate(tensors)]
    out, tangent = torch.func.jvp(call, tuple(tensors), tuple(slopes))
    cotangent = draw(len(out), seed=50)
    grads = torch.func.grad(lambda *x: call(*x) @ cotangent, argnums=tuple(range(len(tensors))))(*tensors)
    both = (tangent.double() @ cotangent.double(), sum((g.double() * s.double()).sum() for g, s in zip(grads, slopes)))
    assert torch.allclose(*both, rtol=1e-4, atol=1e-4) and tangent.any()
    with use_backend("torch"):
        assert torch.allclose(out, call(*tensors), atol=1e-5)
    batch = [torch.stack([t, t + 0.1 * s]) for t, s in zip(tensors, slopes)]
    got, want = torch.vmap(call)(*batch), torch.stack([call(*(t[i] for t in batch)) for i in range(2)])
    assert torch.allclose(got, want, atol=1e-4)


def test_topk_mask_under_vmap():
    batch = torch.stack([SCM, -2 * SCM, draw(N, H, J, K, seed=9)])
    assert torch.equal(torch.vmap(lambda x: ops.topk_mask(x, 7))(batch),
                       torch.stack([ops.topk_mask(x, 7) for x in batch]))  # fmt: skip


@backends(DIFFERENTIABLE)
def test_a_batch_of_gradients(name, backend):
    tensors, call = leaves(name)
    tensors = [t.clone().requires_grad_() for t in tensors]
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says of its loop over the batch that it is one
        out = call(*tensors)
        several = draw(3, len(out), seed=60)
        got = torch.autograd.grad(out, tensors, several, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, tensors, one, retain_graph=True) for one in several]
    for a, b in zip(got, zip(*each), strict=True):
        assert torch.allclose(a, torch.stack(b), atol=1e-4)


@backends(DIFFERENTIABLE)
def test_one_gradient_alone(name, backend):
    tensors, call = leaves(name)

    def gradients(wanted: list[int]) -> tuple[torch.Tensor, ...]:
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        with use_backend(backend):
            out = call(*given)
        return torch.autograd.grad(out, [given[i] for i in wanted], draw(len(out), seed=60))

    for i, want in enumerate(gradients([*range(len(tensors))])):
        torch.testing.assert_close(gradients([i])[0], want)


@built
@pytest.mark.parametrize("name", ["mhsc", "mhsc_coo", "tokens_to_images"])
def test_a_gradient_that_nobody_wants_is_not_computed(name, monkeypatch):
    """The launcher is told which of the first tensor's gradient and the others' it has to find."""
    launch, told = getattr(native, f"{name}_bwd"), []
    monkeypatch.setattr(native, f"{name}_bwd", lambda *arguments: told.append(arguments[-2:]) or launch(*arguments))
    tensors, call = leaves(name)
    with use_backend("native"):
        for wanted in range(len(tensors)):
            call(*(t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors))).sum().backward()
    assert told == [(i == 0, i != 0) for i in range(len(tensors))]


ONCE = ["mhsc", "mhsc_coo", "tokens_to_images", "freenet", "freenet_coo", "unroll_step"]


@built
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_that_is_not_there_says_what_to_do(name):
    """Of the gradient of each input alone: none may come out as if it were a constant. (That of unroll_step's theta is
    the slope itself, and has its second derivative.)"""
    inputs, call = leaves(name)
    inputs = [t.clone().requires_grad_() for t in inputs]

    def twice(of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, = torch.autograd.grad(call(*inputs).square().sum(), of, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs, materialize_grads=True)

    for place, one in enumerate(inputs):
        with use_backend("torch"):
            want = twice(one)
        with use_backend("native"):
            if (name, place) == ("unroll_step", 0):
                torch.testing.assert_close(twice(one), want)
                continue
            with pytest.raises(RuntimeError, match="differentiable once on this backend.*use_backend"):
                twice(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_half_precision(name, dtype):
    """Values and gradients: off by at most a few roundings of the largest value, in the dtype that went in."""
    if name == "unroll_step":
        pytest.skip("a parameter vector is never of half precision")
    tensors, call = leaves(name)
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with use_backend("torch"):
        out, wide = call(*tensors), call(*exact)
    cotangent = draw(len(out), seed=50).to(dtype)
    pairs = [(out, wide), *zip(torch.autograd.grad(out, tensors, cotangent),
                               torch.autograd.grad(wide, exact, cotangent.double()), strict=True)]  # fmt: skip
    for got, want in pairs:
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max().clamp(min=1)


@backends(["add_layer_norm", "freenet_block", "freenet_coo", "norm_act_pool", "unroll_step", "unroll_step_adjoint"])
def test_traces_as_one_graph(name, backend):
    tensors, call = leaves(name)
    with use_backend(backend):
        compiles(call, *tensors)


CHECKED = ["sparsify", "topk_mask", "coo_encode", "coo_decode", "mhsc_coo", "freenet_coo"]


@pytest.mark.parametrize("backend", [pytest.param("native", marks=built), "torch"])
def test_a_check_that_is_asked_for_traces(backend):
    """PyTorch's backend cannot look while it is compiled, and does not: a NaN ranks last, an entry is left out."""
    def walk(scm, cols):
        stored = STORED[0], STORED[1], cols
        arguments = {name: (scm, 7) if name in CHECKED[:3] else (*stored, *CASES[name][3:]) for name in CHECKED}
        found = [getattr(ops, name)(*given, check=True) for name, given in arguments.items()]
        return tuple(tree_flatten(found)[0])

    with use_backend(backend):
        compiles(walk, SCM, STORED[2])
        compiled = torch.compile(walk, fullgraph=True, backend="aot_eager")
        holed = SCM.clone()
        holed[1, 2, 3, 4] = torch.nan
        for bad in ((holed, STORED[2]), (SCM, STORED[2] + 2)):
            if backend == "torch":
                assert all(t.isfinite().all() for t in compiled(*bad))
            else:
                with pytest.raises(ValueError, match="NaN|out of range"):
                    compiled(*bad)


@backends(["freenet_block", "freenet", "freenet_coo"])
def test_weights_of_a_block_in_a_list(name, backend):
    *rest, weights, norm = CASES[name] if name == "freenet_block" else (*CASES[name], None)
    listed = list(weights) if norm else weights._replace(blocks=[list(block) for block in weights.blocks])
    with use_backend(backend):
        want = getattr(ops, name)(*CASES[name])
        assert torch.equal(getattr(ops, name)(*rest, listed, *([norm] if norm else [])), want)


@backends(["mhsc_coo"])
def test_tokens_that_are_not_finite(name, backend):
    """As the docstring of mhsc_coo says: a kernel never meets the token that no entry uses."""
    values, rows, cols = STORED
    unused, used = SAET.clone(), SAET.clone()
    unused[1, 2], used[3, 2] = torch.nan, torch.inf
    with use_backend(backend):
        for saet, reached in ((unused, []), (used, [3])):
            lost = ~ops.mhsc_coo(values, rows, cols, saet, J).isfinite()
            assert not lost[:, :, [0, 1, 3, 4, 5]].any()
            assert lost[:, :, 2].all() if backend == "torch" else lost[0, :, 2].nonzero().flatten().tolist() == reached


@backends(["coo_encode"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_backward_pass_chooses_for_itself(name, backend, dtype):
    """coo_encode takes half precision natively, coo_decode, its adjoint, does not."""
    scm = SCM.to(dtype).requires_grad_()
    with use_backend(backend):
        ops.coo_encode(scm, 7)[0].sum().backward()
    assert torch.equal(scm.grad, ops.topk_mask(scm, 7).to(dtype))
