"""The Triton kernels of patchify, unpatchify and tokens_to_images."""

from __future__ import annotations

import pytest
import torch
from support import poisoned_memory
from triton_support import FLOATS, LAYOUTS, randn

from speedk.kernels.patches import patchify_fwd, unpatchify_fwd
from speedk.ops.patches import patchify_reference, unpatchify_reference

IMAGES = [  # N, C, H, W, patch
    (3, 3, 32, 32, 4),
    (2, 3, 32, 32, 8),
    (5, 1, 8, 8, 4),
    (1, 1, 1, 1, 1),
    (7, 3, 6, 12, 3),  # not square, odd patch
    (2, 5, 10, 10, 5),  # more channels than a block holds
    (1, 3, 64, 32, 32),  # rows of a patch in several programs
    (0, 3, 8, 8, 4),
]


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_patchify_and_back(shape, dtype):
    n, c, h, w, patch = shape
    images = randn(n, c, h, w, dtype=dtype)
    with poisoned_memory():
        tokens = patchify_fwd(images, patch)
        back = unpatchify_fwd(tokens, c, patch, w // patch)
    assert torch.equal(tokens, patchify_reference(images, patch))
    assert torch.equal(back, images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    images = randn(3, 3, 8, 8, layout=layout)
    assert torch.equal(patchify_fwd(images, 4), patchify_reference(images, 4))
    tokens = randn(3, 9, 48, layout=layout)
    assert torch.equal(unpatchify_fwd(tokens, 3, 4), unpatchify_reference(tokens, 3, 4))
