"""The calls whose kernels are compiled offline: every launcher, at the recipes' own shapes, in each precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from speedk.kernels import add_layer_norm, coo, freenet, mhsc, patches
from speedk.ops.add_layer_norm import WIDEST

RECIPES = [  # N, H, J, K, k, D, C, patch: the widths and codes at which the launchers choose differently
    (64, 2, 64, 16, 48, 32, 3, 4),  # CIFAR-10, 1 image per class
    (128, 3, 64, 64, 48, 96, 3, 4),  # CIFAR-10, 10
    (32, 4, 256, 256, 192, 192, 3, 8),  # ImageNet subsets, 1
    (32, 6, 256, 256, 384, 384, 3, 8),  # ImageNet subsets, 10
]
ODD = [  # nobody's, nothing a multiple of 16: a wide head, a narrow one, wide rows and long lines of a patch
    (9, 1, 49, 37, 20, 200, 1, 5),
    (9, 2, 49, 37, 20, 100, 1, 65),
    (9, 3, 49, 37, 20, 300, 3, 100),
]
BETWEEN = (9, 1, 64, 64, 48, 64, 3, 4)  # a block of 64 columns, which no recipe has
ONES = (1, 1, 1, 1, 1, 1, 1, 1)  # Triton makes a constant of an argument that is 1, a Python number to the kernel
LONG = (2, 3, 1, 400, 24, 48, 3, 4)  # indices of 16 bits, one patch
PRECISIONS = [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest")]


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, call) for each; a call must run before the next is asked for, as the precision is set around it."""
    for recipe in RECIPES:
        for dtype, precision in PRECISIONS:
            name = "tf32" if precision == "high" else str(dtype).removeprefix("torch.")
            with matmul_precision(precision):
                yield from _of(recipe, dtype, f"{name} {'/'.join(map(str, recipe))}", products=precision == "high")
    with matmul_precision("high"):
        for sizes in ODD:
            yield from _of(sizes, torch.float32, f"odd tf32 {'/'.join(map(str, sizes))}", products=False)
        for sizes in (ONES, LONG):
            yield from _of(sizes, torch.float32, f"edge tf32 {'/'.join(map(str, sizes))}", products=False)
    yield from _of(BETWEEN, torch.float32, f"float32 {'/'.join(map(str, BETWEEN))}", products=True)
    for dtype in (torch.float32, torch.bfloat16):
        rows, vector = (torch.empty(*shape, WIDEST, dtype=dtype, device="meta") for shape in ((9,), ()))
        yield from _norms(rows, vector, f"widest {str(dtype).removeprefix('torch.')}")
    for k, index in ((0, torch.uint8), (5, torch.int64)):  # nothing stored; indices of 64 bits, which are narrowed
        values, scm, saet = (torch.empty(shape, device="meta") for shape in ((2, 2, k), (2, 2, 9, 6), (6, 8)))
        yield from _stored(values, values.to(index), scm, saet, f"edge k={k} {str(index).removeprefix('torch.')}")
    yield from _of(RECIPES[0], torch.float16, f"float16 {'/'.join(map(str, RECIPES[0]))}", products=False)


def _of(recipe: tuple[int, ...], dtype: torch.dtype, label: str, products: bool) -> Iterator:
    """All launchers, or only those with matrix products where the others would be the same again."""
    N, H, J, K, k, D, C, patch = recipe
    L = patch * patch * C

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    scm, saet, state, vector = new(N, H, J, K), new(K, D), new(N, J, D), new(D)
    values, index = new(N, H, k), new(N, H, k, dtype=torch.uint8 if max(J, K) <= 256 else torch.uint16)
    yield label, lambda: mhsc.mhsc_fwd(scm, saet)
    yield label, lambda: mhsc.mhsc_bwd(state, scm, saet)
    weight, final = new(D, D), new(L, D)
    block = (weight, vector, vector, vector, weight, vector, weight, vector, vector, vector)
    if D == 96:
        yield label, lambda: freenet.freenet_block_fwd(state, None, block, "branch", 1e-6)
    yield label, lambda: freenet.freenet_block_fwd(state, state, block, "branch", 1e-6)
    yield label, lambda: freenet.freenet_block_bwd(state, state, state, block, "branch", 1e-6)
    yield label, lambda: patches.tokens_to_images_fwd(state, final, new(L), C, patch)
    images = new(N, C, math.isqrt(J) * patch, math.isqrt(J) * patch)
    yield label, lambda: patches.tokens_to_images_bwd(images, state, final, patch)
    yield label, lambda: coo.mhsc_coo_bwd(state, values, index, index, saet)
    if products:
        return
    yield from _norms(state, vector, label)
    yield label, lambda: patches.patchify_fwd(images, patch)
    yield label, lambda: patches.unpatchify_fwd(new(N, J, L), C, patch)
    yield from _stored(values, index, scm, saet, label)


def _norms(rows: torch.Tensor, vector: torch.Tensor, label: str) -> Iterator:
    yield label, lambda: add_layer_norm.add_layer_norm_fwd(rows, rows, vector, vector, 1e-6)
    yield label, lambda: add_layer_norm.add_layer_norm_bwd(rows, rows, rows, vector, 1e-6)


def _stored(values: torch.Tensor, index: torch.Tensor, scm: torch.Tensor, saet: torch.Tensor, label: str) -> Iterator:
    J, K = scm.shape[2:]
    for check in (False, True):
        yield label, lambda check=check: coo.coo_decode_fwd(values, index, index, J, K, check)
    yield label, lambda: coo.coo_decode_bwd(scm, index, index)
    yield label, lambda: coo.mhsc_coo_fwd(values, index, index, saet, J)
