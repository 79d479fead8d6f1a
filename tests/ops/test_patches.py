"""patchify, unpatchify and tokens_to_images on every backend."""

from __future__ import annotations

import forms
import pytest
import torch
from support import DEVICES, FLOATS, LAYOUTS, assert_matches, built, compiles, on_backends, poisoned_memory, strided

from speedk.ops import patches, patchify, tokens_to_images, unpatchify, use_backend

IMAGES = [  # N, C, H, W, patch
    (3, 3, 32, 32, 4),
    (2, 3, 32, 32, 8),
    (5, 1, 8, 8, 4),
    (1, 1, 1, 1, 1),
    (7, 3, 6, 12, 3),  # not square, odd patch
    (2, 5, 10, 10, 5),
    (1, 3, 64, 32, 32),
    (0, 3, 8, 8, 4),
    (2, 0, 8, 8, 4),
    (2, 3, 0, 8, 4),
]


def tokens_by_loops(images: torch.Tensor, patch: int) -> torch.Tensor:
    """The definition: patches row-major, values of a token ordered (row, column, channel)."""
    n, c, height, width = images.shape
    columns = width // patch
    tokens = torch.empty(n, height // patch * columns, patch * patch * c, dtype=images.dtype)
    for y in range(height):
        for x in range(width):
            place = (y % patch * patch + x % patch) * c
            tokens[:, y // patch * columns + x // patch, place:place + c] = images[:, :, y, x]
    return tokens


@on_backends("patchify", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_the_definition(shape, dtype, device, backend):
    n, c, height, width, patch = shape
    images = torch.randn(n, c, height, width).to(dtype)
    want = tokens_by_loops(images, patch)
    with use_backend(backend), poisoned_memory():
        assert torch.equal(patchify(images.to(device), patch).cpu(), want)
        if height == width:
            assert torch.equal(unpatchify(want.to(device), c, patch).cpu(), images)


@on_backends("patchify")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    images, tokens = strided(torch.randn(3, 3, 8, 8), layout), strided(torch.randn(3, 9, 48), layout)
    with use_backend(backend):
        assert torch.equal(patchify(images, 4), tokens_by_loops(images, 4))
        assert torch.equal(tokens_by_loops(unpatchify(tokens, 3, 4), 4), tokens)


@on_backends("tokens_to_images", DEVICES)
@pytest.mark.parametrize("shape", [(3, 64, 32, 3, 4), (40, 256, 24, 3, 8), (2, 9, 5, 1, 3), (1, 1, 1, 1, 1),
                                   (0, 4, 8, 3, 2), (2, 9, 0, 3, 2)], ids=str)  # fmt: skip
def test_tokens_to_images(shape, device, backend):
    n, j, d, channels, patch = shape
    dtype = torch.float32
    length, side = patch * patch * channels, round(j**0.5) * patch
    inputs = [torch.randn(*s, dtype=dtype) for s in ((n, j, d), (length, d), (length,))]
    d_images = torch.randn(n, channels, side, side, dtype=dtype)

    def run(function, dtype, device="cpu"):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        out = function(*leaves, channels, patch)
        return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, leaves, d_images.to(device, dtype)))]

    with use_backend(backend), poisoned_memory():
        got = run(tokens_to_images, dtype, device)
    library, exact = run(forms.tokens_to_images, dtype, device), run(forms.tokens_to_images, torch.float64)
    tokens = torch.einsum("njd,ld->njl", *(t.double() for t in inputs[:2])) + inputs[2].double()
    assert torch.allclose(tokens_by_loops(exact[0], patch), tokens)
    for name, *triple in zip(("images", "d_state", "d_weight", "d_bias"), got, library, exact):
        assert_matches(name, *triple)


@on_backends("tokens_to_images")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_to_images_strides(layout, backend):
    inputs = [strided(torch.randn(3, 4, 6), layout), strided(torch.randn(12, 6), layout), torch.randn(24)[::2]]
    with use_backend(backend):
        got = tokens_to_images(*inputs, 3, 2)
    assert torch.allclose(got, forms.tokens_to_images(*inputs, 3, 2), atol=1e-5)


def test_refusals():
    for message, call in {
        "patch=3 does not divide images of 8x8": lambda: patchify(torch.randn(1, 3, 8, 8), 3),
        "patch=0": lambda: patchify(torch.randn(1, 3, 8, 8), 0),
        r"\(3, 8, 8\)": lambda: patchify(torch.randn(3, 8, 8), 4),
        r"must be \[N, J, 48\]": lambda: unpatchify(torch.randn(1, 4, 47), 3, 4),
        "J=5 patches do not make a square": lambda: unpatchify(torch.randn(1, 5, 48), 3, 4),
        r"weight \[12, D\]": lambda: tokens_to_images(torch.randn(1, 4, 6), torch.randn(12, 5), torch.randn(12), 3, 2),
        "bias is torch.float64": lambda: tokens_to_images(torch.randn(1, 4, 6), torch.randn(12, 6),
                                                          torch.randn(12).double(), 3, 2),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@on_backends("patchify")
def test_gradients(backend):
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: patchify(x, 2), images)
            assert check(lambda x: unpatchify(x, 3, 2), tokens)


def test_tokens_to_images_in_double():
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 3), (12, 3), (12,))]
    assert torch.autograd.gradcheck(lambda *x: tokens_to_images(*x, 3, 2), inputs)
    with use_backend("native"), pytest.raises(ValueError, match="float64 is computed in PyTorch|not built"):
        tokens_to_images(*inputs, 3, 2)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    images = strided(torch.randn(3, 3, 4, 4), layout).detach()
    tokens = strided(torch.randn(3, 4, 12), layout).detach()
    state = strided(torch.randn(3, 4, 6), layout).detach()
    weight, bias = torch.randn(12, 6), torch.randn(12)
    need = {"plain": (True, False), "transposed": (False, True)}.get(layout, (True, True))
    torch.library.opcheck(patches._tokens_to_images_bwd, (images, state, weight, 2, *need, "native"))
    for tensor in (images, tokens, state, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(patches._patchify, (images, 2, "native"))
    torch.library.opcheck(patches._unpatchify, (tokens, 3, 2, 2, "native"))
    torch.library.opcheck(patches._tokens_to_images, (state, weight, bias, 3, 2, "native", "native"))


@on_backends("patchify")
def test_compile(backend):
    with use_backend(backend):
        compiles(lambda images: unpatchify(patchify(images, 2) * 2, 3, 2), torch.randn(2, 3, 4, 4))


@on_backends("tokens_to_images")
def test_tokens_to_images_compile(backend):
    with use_backend(backend):
        compiles(lambda *x: tokens_to_images(*x, 3, 2), torch.randn(2, 4, 6), torch.randn(12, 6), torch.randn(12))


def test_transforms_take_torch():
    images = torch.randn(3, 2, 3, 4, 4)
    want = torch.stack([tokens_by_loops(x, 2) for x in images])
    assert torch.equal(torch.vmap(lambda x: patchify(x, 2))(images), want)
    _, tangent = torch.func.jvp(lambda x: unpatchify(x, 3, 2), (want[0],), (want[1],))
    assert torch.equal(tangent, images[1])


@on_backends("patchify")
def test_results_are_never_views(backend):
    with use_backend(backend):
        for x in (torch.randn(2, 1, 3, 4), torch.randn(2, 3, 3, 4).to(memory_format=torch.channels_last)):
            before = x.clone()
            patchify(x, 1).add_(1)
            assert torch.equal(x, before)
        tokens = torch.randn(2, 1, 4)
        before = tokens.clone()
        unpatchify(tokens, 1, 2).add_(1)
        assert torch.equal(tokens, before)
