"""The decoder on every backend: Eq. 4 written out token by token in float64, both norms, gradients of all weights."""

from __future__ import annotations

import math

import forms
import pytest
import torch
from support import (
    BY_EACH_UNIT,
    DEVICES,
    assert_matches,
    built,
    compiles,
    has_unit,
    on_backends,
    poisoned_memory,
    products_by,
)

from speedk.ops import (
    BlockWeights,
    FReeNetWeights,
    coo_encode,
    dispatch,
    freenet,
    freenet_block,
    freenet_coo,
    mhsc,
    native,
    sparsify,
    tokens_to_images,
    use_backend,
)
from speedk.ops.freenet import NATIVE_BLOCKS, NATIVE_LEAST_FOR_UNIT, _freenet, _freenet_bwd, _kept, _natively
from speedk.ops.patches import tokens_to_images_reference

SHAPES = [  # N, H, J, K, D, R, patch, channels
    (3, 2, 64, 16, 32, 1, 4, 3),  # CIFAR-10, 1 image per class
    (2, 6, 64, 16, 96, 3, 4, 3),
    (7, 3, 9, 7, 21, 3, 3, 2),  # nothing a multiple of a vector
    (40, 1, 4, 5, 16, 2, 2, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 2, 4, 3, 8, 2, 2, 3),
]

WIDE = [  # of the same, enough for the matrix unit
    (7, 5, 49, 19, 65, 2, 3, 2),  # no side of a product a multiple of its tiles, images across blocks of tokens
    (3, 2, 64, 96, 192, 3, 4, 3),  # deeper than it goes at a time
    (2, 3, 256, 40, 96, 1, 8, 3),  # an image in several blocks of tokens
]


def make(shape, norm="branch", dtype=torch.float32):
    n, h, j, k, d, r, patch, channels = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size, mean=0.0, scale=1.0):
        return (mean + scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)

    def linear(out, inside):
        return draw(out, inside, scale=inside**-0.5), draw(out, scale=0.1)

    def layer_norm():
        return draw(d, mean=1.0, scale=0.1), draw(d, scale=0.1)

    blocks = tuple(BlockWeights(*linear(d, d), *layer_norm(), *linear(d, d), *linear(d, d), *layer_norm())
                   for _ in range(r))  # fmt: skip
    final = linear(patch * patch * channels, d)
    return draw(n, h, j, k), draw(k, d), FReeNetWeights(blocks, *final, channels, patch, j, norm)


def leaves_of(scm, saet, weights, dtype=None, device="cpu"):
    """The same, as leaves of a new graph, and a flat list of them."""
    flat = [t.detach().to(device, dtype or t.dtype, copy=True).requires_grad_() for t in
            (scm, saet, *(t for block in weights.blocks for t in block), weights.weight, weights.bias)]
    blocks = tuple(BlockWeights(*flat[2 + 10 * r:12 + 10 * r]) for r in range(len(weights.blocks)))
    return flat[0], flat[1], weights._replace(blocks=blocks, weight=flat[-2], bias=flat[-1]), flat


def by_the_paper(scm, saet, weights):
    """Eq. 2 to 4, token by token: plain arithmetic on vectors, no library layer."""
    def norm(v, w, b):
        v = v - v.mean(-1, keepdim=True)
        return v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) * w + b

    n, h, j, _ = scm.shape
    d, patch = saet.shape[1], weights.patch
    side = math.isqrt(j)
    images = scm.new_zeros(n, weights.channels, side * patch, side * patch)
    rows = []
    for token in range(j):
        features = torch.cat([scm[:, i, token] @ saet[:, i * d // h:(i + 1) * d // h] for i in range(h)], -1)
        state = torch.zeros_like(features)
        for b in weights.blocks:
            branch = features @ b.proj_weight.T + b.proj_bias
            if weights.norm == "branch":
                hidden = norm(branch, b.norm1_weight, b.norm1_bias) + state
            else:
                hidden = norm(branch + state, b.norm1_weight, b.norm1_bias)
            inner = hidden @ b.fc1_weight.T + b.fc1_bias
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            state = norm(inner @ b.fc2_weight.T + b.fc2_bias + hidden, b.norm2_weight, b.norm2_bias)
        values = state @ weights.weight.T + weights.bias
        rows.append(values.reshape(n, patch, patch, weights.channels).permute(0, 3, 1, 2))
    grid = [torch.cat(rows[y * side:(y + 1) * side], -1) for y in range(side)]
    return torch.cat(grid, -2) if grid else images


def run(function, scm, saet, weights, d_images, dtype=None, device="cpu"):
    *inputs, flat = leaves_of(scm, saet, weights, dtype, device)
    images = function(*inputs)
    grads = torch.autograd.grad(images, flat, d_images.to(images))
    return [t.cpu() for t in (images.detach(), *grads)]


@on_backends("freenet", DEVICES)
@pytest.mark.parametrize("norm", ["branch", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, norm, device, backend):
    inputs = make(shape, norm)
    side = math.isqrt(shape[2]) * shape[6]
    d_images = torch.randn(shape[0], shape[7], side, side)
    with use_backend(backend), poisoned_memory():
        got = run(freenet, *inputs, d_images, device=device)
        plain = freenet(*(t.to(device) for t in inputs[:2]), leaves_of(*inputs, device=device)[2]).detach().cpu()
    library = run(forms.freenet, *inputs, d_images, device=device)
    exact = run(by_the_paper, *inputs, d_images, torch.float64)
    assert torch.equal(plain, got[0]), "the way without gradients gives the same bits"
    for i, triple in enumerate(zip(got, library, exact)):
        assert_matches(f"{shape} tensor {i}", *triple)


@BY_EACH_UNIT
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "found again"])
@pytest.mark.parametrize("norm", ["branch", "sum"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_each_way_of_the_native_decoder(shape, norm, keeps, unit, monkeypatch):
    """Products by the matrix unit or by vectors; and for the way back everything kept, or found once more."""
    inputs, side = make(shape, norm), math.isqrt(shape[2]) * shape[6]
    d_images = torch.randn(shape[0], shape[7], side, side)
    monkeypatch.setattr(native, "matrix_unit", lambda: not keeps)
    with use_backend("native"), products_by(unit), poisoned_memory():
        got = run(freenet, *inputs, d_images)
        plain = freenet(*inputs[:2], inputs[2])
        features = run(from_features, *inputs, d_images)
    library, exact = run(forms.freenet, *inputs, d_images), run(by_the_paper, *inputs, d_images, torch.float64)
    assert torch.equal(plain, got[0])
    for i, (one, other, *pair) in enumerate(zip(got, features, library, exact)):
        assert_matches(f"tensor {i}", one, *pair)
        assert_matches(f"tensor {i} by way of the features", other, *pair)


def from_features(scm, saet, weights):
    """The native decoder of features that mhsc made, as `freenet_coo` calls it."""
    return _natively(mhsc(scm, saet), None, weights)


@has_unit
def test_the_matrix_unit_is_shared_with_the_library():
    """Each thread's unit has one setting of tiles; PyTorch's own products of bfloat16 want another."""
    scm, saet, weights = make((64, 3, 64, 16, 96, 1, 4, 3))
    convolution, x = torch.nn.Conv2d(64, 64, 3, padding=1).bfloat16(), torch.randn(16, 64, 16, 16).bfloat16()
    with use_backend("native"), products_by(True), torch.no_grad():
        images, features = freenet(scm, saet, weights), convolution(x)
        for _ in range(5):
            assert torch.equal(freenet(scm, saet, weights), images)
            assert torch.equal(convolution(x), features)


@has_unit
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_matrix_unit_is_as_exact_at_any_scale(side, scale):
    state, weight, bias = torch.randn(5, 49, 65), torch.randn(18, 65), torch.zeros(18)
    inputs = (state * scale, weight, bias) if side == "left" else (state, weight * scale, bias)
    with use_backend("native"), products_by(True):
        got = tokens_to_images(*inputs, 2, 3)
    library, exact = (tokens_to_images_reference(*(t.to(dtype) for t in inputs), 2, 3)
                      for dtype in (torch.float32, torch.float64))  # fmt: skip
    assert_matches(f"{side} times {scale}", got, library, exact)


@has_unit
@pytest.mark.parametrize("tiny", [4.57e-41, 1e-39, 3e-38, 1e-35])
def test_tiny_values_beside_ordinary_ones(tiny):
    """Of values that have no bits left for three pieces, none reaches the value that they are a pair with."""
    state, weight = torch.randn(4, 16, 64), torch.randn(12, 64)
    for tensor in (state, weight):
        tensor[..., 16:32] *= tiny
        tensor[0] *= tiny
    leaves = [state.requires_grad_(), weight.requires_grad_(), torch.randn(12, requires_grad=True)]
    d_images = torch.randn(4, 3, 8, 8) * torch.tensor([1, tiny, 1, tiny])[:, None, None, None]

    def run_all(dtype):
        inputs = [t.to(dtype) for t in leaves]
        images = tokens_to_images(*inputs, 3, 2)
        return [t.detach() for t in (images, *torch.autograd.grad(images, leaves, d_images.to(dtype)))]

    with use_backend("native"), products_by(True):
        got = run_all(torch.float32)
    for found, exact in zip(got, run_all(torch.float64)):
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)


@has_unit
def test_an_image_has_the_same_bits_wherever_it_is_in_a_batch():
    scm, saet, weights = make((40, 2, 9, 20, 64, 2, 2, 3))
    with use_backend("native"), products_by(True), torch.no_grad():
        together = freenet(scm, saet, weights)
        for size in (1, 7):
            assert torch.equal(torch.cat([freenet(part, saet, weights) for part in scm.split(size)]), together)


@on_backends("freenet")
def test_from_stored_entries(backend):
    scm, saet, weights = make(SHAPES[1])
    values, rows, cols = coo_encode(scm, 9)
    with use_backend(backend):
        got = freenet_coo(values, rows, cols, saet, weights)
        with pytest.raises(ValueError, match="out of range"):
            freenet_coo(values, rows, cols, saet[:3], weights)
    exact = by_the_paper(sparsify(scm, 9).double(), *leaves_of(scm, saet, weights, torch.float64)[1:3])
    assert_matches("images", got, forms.freenet_coo(values, rows, cols, saet, weights), exact)


@on_backends("freenet")
@pytest.mark.parametrize("width", [32, 64])
def test_the_same_bits_on_any_number_of_threads(backend, width):
    inputs = make((40, 2, 16, 8, width, 2, 2, 3))
    found, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with use_backend(backend):
                got = run(freenet, *inputs, torch.ones(40, 3, 8, 8))
            found.add(b"".join(t.numpy().tobytes() for t in got))
    finally:
        torch.set_num_threads(before)
    assert backend == "torch" or len(found) == 1


@built
def test_gelu_over_its_whole_range():
    """One block of identities, whose GELU sees -8 to 8: the polynomial of the native kernel against the definition."""
    x = torch.linspace(-1, 1, 16 * 1024)[torch.randperm(16 * 1024)].reshape(1024, 16)
    eye, zero, one = torch.eye(16), torch.zeros(16), torch.ones(16)
    block = BlockWeights(eye, zero, 4 * one, zero, eye, zero, eye, zero, one, zero)
    weights = FReeNetWeights((block,), eye, zero, 1, 4, 1)
    scm, saet = x[:, None, None, :], eye
    d_images = torch.randn(1024, 1, 4, 4)
    got = run(freenet, scm, saet, weights, d_images)
    library = run(forms.freenet, scm, saet, weights, d_images)
    for i, triple in enumerate(zip(got, library, run(by_the_paper, scm, saet, weights, d_images, torch.float64))):
        assert_matches(f"tensor {i}", *triple)


def test_strides():
    scm, saet, weights = make((3, 2, 16, 8, 12, 2, 2, 3))
    want = freenet(scm, saet, weights)
    turned = weights._replace(blocks=tuple(BlockWeights(*(t.t().contiguous().t() for t in b)) for b in weights.blocks))
    assert torch.equal(freenet(scm.transpose(2, 3).contiguous().transpose(2, 3), saet.T.contiguous().T, turned), want)
    shared = scm[:1].expand(3, 2, 16, 8)
    assert torch.allclose(freenet(shared, saet, weights), want[:1].expand_as(want), atol=1e-6)


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_gradcheck_and_double_precision(norm):
    inputs = make((2, 2, 4, 3, 6, 2, 1, 2), norm, torch.float64)
    *_, flat = leaves_of(*inputs)

    def images(*flat):
        blocks = tuple(BlockWeights(*flat[2 + 10 * r:12 + 10 * r]) for r in range(2))
        return freenet(flat[0], flat[1], inputs[2]._replace(blocks=blocks, weight=flat[-2], bias=flat[-1]))

    with use_backend("torch"):
        assert torch.autograd.gradcheck(images, flat)
        assert torch.autograd.gradgradcheck(lambda scm: images(scm, *flat[1:]), flat[0])
    assert torch.allclose(images(*flat), by_the_paper(*inputs))


@built
@pytest.mark.parametrize("source", ["codes", "features"])
@pytest.mark.parametrize("layout", ["plain", "expanded"])
def test_opcheck(layout, source):
    scm, saet, weights = make((3, 2, 4, 3, 6, 2, 2, 3))
    inputs = (scm, saet) if source == "codes" else (mhsc(scm, saet), None)
    flat = [t for b in weights.blocks for t in b] + [weights.weight, weights.bias]
    d_images = torch.ones(()).expand(3, 3, 4, 4) if layout == "expanded" else torch.randn(3, 3, 4, 4)
    for keep in (True, False):
        _, kept = _freenet(*inputs, flat, 3, 2, False, keep)
        torch.library.opcheck(_freenet_bwd, (d_images, kept, *inputs, flat, 3, 2, False, keep, keep))
    for leaf in (*inputs, *flat):
        if leaf is not None:
            leaf.requires_grad_()
    for keep in (True, False):
        torch.library.opcheck(_freenet, (*inputs, flat, 3, 2, False, keep))


@on_backends("freenet")
@pytest.mark.parametrize("width", [6, 64])
def test_compile(backend, width):
    scm, saet, weights = make((3, 2, 4, 3, width, 2, 2, 3))
    with use_backend(backend):
        compiles(lambda scm: freenet(scm, saet, weights), scm)
        leaves = scm.requires_grad_(), saet.requires_grad_()
        compiled = torch.compile(freenet, fullgraph=True, backend="aot_eager")
        for way in zip(*(torch.autograd.grad(f(*leaves, weights).square().sum(), leaves) for f in (freenet, compiled))):
            assert torch.allclose(*way, atol=1e-5)


def test_transforms_take_torch():
    scm, saet, weights = make((3, 2, 4, 3, 6, 2, 2, 3), dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda a: freenet(a, saet, weights), (scm,), (torch.ones_like(scm),))
    step = 1e-6
    numeric = (freenet(scm + step, saet, weights) - freenet(scm - step, saet, weights)) / (2 * step)
    assert torch.allclose(tangent, numeric, atol=1e-6)


def test_refusals():
    scm, saet, weights = make((3, 2, 4, 3, 6, 2, 2, 3))
    state = torch.zeros(3, 4, 6)
    for message, call in {
        "at least one block": lambda: freenet(scm, saet, weights._replace(blocks=())),
        "norm='post'": lambda: freenet(scm, saet, weights._replace(norm="post")),
        "J=4 patches but the weights are for 9": lambda: freenet(scm, saet, weights._replace(patches=9)),
        r"must be \(12, 6\).*got \(11, 6\)": lambda: freenet(scm, saet, weights._replace(weight=torch.randn(11, 6))),
        "bias is torch.float64": lambda: freenet(scm, saet, weights._replace(bias=torch.randn(12).double())),
        "norm='post' ": lambda: freenet_block(state, None, weights.blocks[0], norm="post"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@built
def test_what_the_native_decoder_takes_and_keeps_is_said_alike_on_both_sides():
    assert dispatch.native().decoder_blocks == NATIVE_BLOCKS
    assert dispatch.native().decoder_least_for_unit == NATIVE_LEAST_FOR_UNIT
    for blocks in (0, 1, 3):
        weights = [torch.zeros(8)] * (len(BlockWeights._fields) * blocks + 2)
        for inputs in ((torch.zeros(2, 9, 8), None), (torch.zeros(2, 4, 9, 5), torch.zeros(5, 8))):
            assert native._net(*inputs, weights, 3, 4, False).kept == _kept(*inputs, weights)
