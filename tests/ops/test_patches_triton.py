"""The Triton kernels of patchify, unpatchify and tokens_to_images."""

from __future__ import annotations

import forms
import pytest
import torch
from support import assert_matches, poisoned_memory
from triton_support import DOT_FLOATS, FLOATS, LAYOUTS, gradients, kinds, randn

from speedk.kernels import patches
from speedk.kernels.patches import patchify_fwd, tokens_to_images_bwd, tokens_to_images_fwd, unpatchify_fwd

IMAGES = [  # N, C, H, W, patch
    (3, 3, 32, 32, 4),
    (2, 3, 32, 32, 8),
    (5, 1, 8, 8, 4),
    (1, 1, 1, 1, 1),
    (7, 3, 6, 12, 3),  # not square, odd patch
    (2, 5, 10, 10, 5),
    (2, 3, 24, 40, 8),  # a last program that is not full
    (2, 9, 8, 8, 4),  # as many channels as leave less than 16 bytes to a unit
    (1, 40, 8, 8, 4),  # a column at a time
    (1, 3, 64, 32, 32),  # a patch in several programs
    (0, 3, 8, 8, 4),
]


@pytest.mark.parametrize(("shape", "dtype"), kinds(IMAGES, FLOATS), ids=str)
def test_patchify_and_back(shape, dtype):
    n, c, h, w, patch = shape
    images = randn(n, c, h, w, dtype=dtype)
    with poisoned_memory():
        tokens = patchify_fwd(images, patch)
        back = unpatchify_fwd(tokens, c, patch, w // patch)
    assert torch.equal(tokens, forms.patchify(images, patch))
    assert torch.equal(back, images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    images = randn(3, 3, 8, 8, layout=layout)
    assert torch.equal(patchify_fwd(images, 4), forms.patchify(images, 4))
    tokens = randn(3, 9, 48, layout=layout)
    assert torch.equal(unpatchify_fwd(tokens, 3, 4), forms.unpatchify(tokens, 3, 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_views_that_begin_anywhere(start, dtype):
    """Where addresses or strides are not multiples of 16 bytes, units are narrower."""
    images = randn(2, 3, 17, 24, dtype=dtype)[:, :, 1:, start:start + 16]
    assert torch.equal(patchify_fwd(images, 8), forms.patchify(images, 8))
    tokens = randn(3, 4, 3 * 64 + 8, dtype=dtype)[:, :, start:start + 192]
    assert torch.equal(unpatchify_fwd(tokens, 3, 8), forms.unpatchify(tokens, 3, 8))


TOKENS = [  # N, J, D, C, patch
    (2, 64, 32, 3, 4),
    (1, 9, 70, 3, 8),
    (3, 4, 9, 1, 3),
    (1, 1, 1, 1, 1),
    (2, 4, 130, 5, 5),
    (2, 4, 48, 3, 1),  # a line of one column, more lines to a program than there are
    (1, 4, 20, 1, 66),  # lines too long for more than one of a program
    (0, 4, 8, 3, 2),
]


def check_linear(state, weight, bias, d_images, channels, patch):
    with poisoned_memory():
        got = tokens_to_images_fwd(state, weight, bias, channels, patch)
        d_state, d_weight, d_bias = tokens_to_images_bwd(d_images, state, weight, patch)

    def function(*inputs):
        return forms.tokens_to_images(*inputs, channels, patch)

    inputs, wide = (state, weight, bias), (state.double(), weight.double(), bias.double())
    assert_matches("images", got, function(*inputs), function(*wide))
    want = gradients(function, *inputs, cotangent=d_images)
    want64 = gradients(function, *wide, cotangent=d_images.double())
    assert_matches("d_state", d_state, want[0], want64[0])
    assert_matches("d_weight", d_weight, want[1], want64[1])
    assert_matches("d_bias", d_bias, want[2], want64[2])
    assert torch.equal(tokens_to_images_bwd(d_images, state, weight, patch, need_weight=False)[0], d_state)
    assert torch.equal(tokens_to_images_bwd(d_images, state, weight, patch, need_state=False)[1], d_weight)


def linear_inputs(shape, **options):
    N, J, D, C, patch = shape
    side, L = int(J**0.5) * patch, patch * patch * C
    return (randn(N, J, D, **options), randn(L, D, seed=1, **options), randn(L, seed=2, dtype=options.get("dtype")),
            randn(N, C, side, side, seed=3, **options), C, patch)  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), kinds(TOKENS, DOT_FLOATS), ids=str)
def test_tokens_to_images(shape, dtype):
    check_linear(*linear_inputs(shape, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_to_images_strides(layout):
    check_linear(*linear_inputs((3, 9, 20, 3, 4), layout=layout, dtype=torch.float32))


def test_tokens_shared_among_programs(monkeypatch):
    monkeypatch.setattr(patches, "SPLIT_PROGRAMS", 2)
    check_linear(*linear_inputs((7, 36, 20, 3, 2), dtype=torch.float32))
