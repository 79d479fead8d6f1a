"""What a kernel would follow out of bounds is refused, through the ops and by whoever calls the registered ones."""

from __future__ import annotations

import pytest
import torch
from support import built

from speedk.ops import BlockWeights, FReeNetWeights, dispatch, freenet, freenet_coo

BLOCK = [torch.randn(6, 6) if i in (0, 4, 6) else torch.randn(6) for i in range(10)]
WEIGHTS = [*BLOCK, torch.randn(12, 6), torch.randn(12)]
INDEX = torch.zeros(2, 3, 2, dtype=torch.uint8)
SCM, SAET, VALUES, FEATURES = torch.randn(2, 3, 4, 5), torch.randn(5, 6), torch.randn(2, 3, 2), torch.randn(2, 4, 6)
IMAGES, KEPT, X, ROW = torch.randn(2, 3, 4, 4), torch.randn(2 * 4 * 20), torch.randn(2, 3, 5, 4), torch.randn(3)
POOLED, STATISTIC, P, LR = torch.randn(2, 3, 2, 2), torch.randn(2, 3), torch.randn(7), torch.tensor(0.1)

CALLS = {  # what goes together, and which of it does not go with the rest once it is a column or an entry shorter
    "mhsc": ([SCM, SAET, "native", "native"], [0, 1]),
    "mhsc_bwd": ([FEATURES, SCM, SAET, True, True, "native"], [0, 1, 2]),
    "coo_decode": ([VALUES, INDEX, INDEX, 4, 5, True, "native"], [0, 1, 2]),
    "coo_decode_bwd": ([SCM.narrow(1, 0, 3), INDEX, INDEX, "native"], [2]),
    "mhsc_coo": ([VALUES, INDEX, INDEX, SAET, 4, True, "native"], [0, 1, 2, 3]),
    "mhsc_coo_bwd": ([FEATURES, VALUES, INDEX, INDEX, SAET, True, True, "native"], [0, 1, 2, 3, 4]),
    "tokens_to_images": ([FEATURES, *WEIGHTS[-2:], 3, 2, "native", "native"], [0, 1, 2]),
    "tokens_to_images_bwd": ([IMAGES, FEATURES, WEIGHTS[-2], 2, True, True, "native"], [0, 1, 2]),
    "add_layer_norm": ([FEATURES, FEATURES, BLOCK[1], BLOCK[1], 1e-6], [0, 1, 2, 3]),
    "add_layer_norm_bwd": ([FEATURES, FEATURES, FEATURES, BLOCK[1], 1e-6], [0, 1, 2, 3]),
    "norm_act_pool": ([X, ROW, ROW, 1e-5, "native"], [1, 2]),
    "norm_act_pool_bwd": ([POOLED, X, ROW, ROW, STATISTIC, STATISTIC, 1e-5, "native"], [0, 2, 3, 4, 5]),
    "norm_act_pool_bwd_bwd": ([X, ROW, ROW, POOLED, X, ROW, ROW, STATISTIC, STATISTIC, 1e-5, "native"],
                              [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "freenet_block": ([FEATURES, FEATURES, BLOCK, "sum", "triton"], [0, 1]),
    "freenet_block_bwd": ([FEATURES, FEATURES, FEATURES, BLOCK, "sum", "triton"], [0, 1, 2]),
    "freenet": ([SCM, SAET, WEIGHTS, 3, 2, False, True], [0, 1]),
    "freenet_bwd": ([IMAGES, KEPT, SCM, SAET, WEIGHTS, 3, 2, False, True, True], [0, 1, 2, 3]),
    "unroll_step": ([P, P, P, LR, 0.5, "native"], [0, 1, 2]),
    "unroll_step_adjoint": ([P, P, P, LR, 0.5, "native"], [0, 1, 2]),
}  # fmt: skip


@built
@pytest.mark.parametrize("name", CALLS)
def test_sizes_and_dtypes_that_do_not_go_together(name):
    arguments, related = CALLS[name]
    op = getattr(torch.ops.speedk, name)
    for i in related:
        tensor = arguments[i]
        with pytest.raises(ValueError):
            op(*arguments[:i], tensor[..., 1:], *arguments[i + 1:])
        if isinstance(arguments[-1], str):
            with pytest.raises(ValueError):
                op(*arguments[:i], tensor.half(), *arguments[i + 1:])


@built
def test_what_was_kept_may_have_strides():
    _, kept = torch.ops.speedk.freenet(SCM, SAET, WEIGHTS, 3, 2, False, True)
    apart = torch.stack((kept, torch.full_like(kept, torch.nan)), 1)[:, 0]
    rest = (SCM, SAET, WEIGHTS, 3, 2, False, True, True)
    (d_scm, d_weights), (other, others) = (torch.ops.speedk.freenet_bwd(IMAGES, t, *rest) for t in (kept, apart))
    assert torch.equal(d_scm, other) and all(map(torch.equal, d_weights, others))


@built
def test_numbers_that_do_not_go_with_the_tensors():
    ops = torch.ops.speedk
    for call in (
        lambda: ops.topk_mask(SCM, 21, True, "native"),
        lambda: ops.sparsify(SCM, -1, True, "native"),
        lambda: ops.coo_encode(SCM, 21, True, "native"),
        lambda: ops.patchify(IMAGES, 3, "native"),
        lambda: ops.patchify(IMAGES, -2, "native"),
        lambda: ops.unpatchify(torch.randn(2, 4, 12), 3, 2, 3, "native"),
        lambda: ops.unpatchify(torch.randn(2, 4, 12), 3, 2, 0, "native"),
        lambda: ops.unpatchify(torch.randn(2, 4, 12), 3, -2, 2, "native"),
        lambda: ops.tokens_to_images(torch.randn(2, 5, 6), *WEIGHTS[-2:], 3, 2, "native", "native"),
        lambda: ops.unpatchify(torch.randn(2, 4, 11), 3, 2, 2, "native"),
        lambda: ops.patchify(torch.ones(1, 1, 4, 4, dtype=torch.uint8), 2, "native"),
        lambda: ops.coo_decode(VALUES, INDEX.to(torch.uint16), INDEX, 4, 5, True, "native"),
        lambda: ops.coo_decode(VALUES, INDEX.long(), INDEX.long(), 4, 5, True, "native"),
        lambda: ops.freenet(FEATURES.double(), None, [w.double() for w in WEIGHTS], 3, 2, False, True),
        lambda: ops.freenet(FEATURES[..., 1:], None, WEIGHTS, 3, 2, False, True),
        lambda: ops.freenet(torch.randn(2, 5, 6), None, WEIGHTS, 3, 2, False, True),
        lambda: ops.freenet(SCM, None, WEIGHTS, 3, 2, False, True),
        lambda: ops.freenet(FEATURES, SAET, WEIGHTS, 3, 2, False, True),
        lambda: ops.freenet(SCM, SAET, WEIGHTS[:-1], 3, 2, False, True),
        lambda: ops.freenet(SCM, SAET, WEIGHTS, 3, 0, False, True),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("backend", [pytest.param("native", marks=built), "torch"])
def test_patches_that_make_no_square(backend):
    """Five patches of a weight that fits were written past the end of an image of four."""
    block = BlockWeights(*(torch.randn(8, 8) if i in (0, 4, 6) else torch.randn(8) for i in range(10)))
    weights = FReeNetWeights((block,), torch.randn(48, 8), torch.randn(48), 3, 4, 5)
    with dispatch.use_backend(backend):
        with pytest.raises(ValueError, match="J=5 patches do not make a square"):
            freenet(torch.randn(3, 1, 5, 4), torch.randn(4, 8), weights)
        index = torch.zeros(3, 1, 2, dtype=torch.uint8)
        with pytest.raises(ValueError, match="J=5 patches do not make a square"):
            freenet_coo(torch.randn(3, 1, 2), index, index, torch.randn(4, 8), weights)


@built
def test_the_extension_refuses_sizes_of_its_own():
    native = dispatch.native()
    for refused in (
        lambda: native.Net(1, 5, 8, 0, 3, 4, 2, False, 0, 0, 0, 0, 0, [0, 0], 1),
        lambda: native.Net(1, 4, 8, 1, 3, 4, 2, False, 0, 0, 0, 0, 0, [0, 0], 1),
        lambda: native.Net(1, 4, 8, 65, 3, 4, 2, False, 0, 0, 0, 0, 0, [0] * 652, 1),
        lambda: native.Net(1, 4, 8, 0, 3, 4, 2, False, 0, 3, 5, 0, 0, [0, 0], 1),
        lambda: native.Net(1, 4, 8, 0, 3, 4, 2, False, 0, 0, 5, 0, 0, [0, 0], 1),
        lambda: native.Topk(0, 0, 1, 2, 2, 5, 0, 0, 0, 0, 0, 0, 1),
        lambda: native.Topk(0, 0, 1, 2, 257, 5, 0, 0, 0, 1, 1, 1, 1),
        lambda: native.Entries(0, 0, 0, 0, 8, 1, 1, 1, 1),
        lambda: native.Mhsc(0, 1, 0, 1, 1, 1, 0, 0, 1),
        lambda: native.Mhsc(0, 1, 2, 1, 1, 3, 0, 0, 1),
        lambda: native.mhsc_coo(native.Entries(0, 0, 0, 0, 1, 3, 0, 1, 1), 0, 2, 4, 0, 1),
        lambda: native.Patches(4, 1, 1, 1, 1, 0),
        lambda: native.NormActPool(0, False, 0, 0, 0, 1, 1, 1, 2, 1e-5),
    ):
        with pytest.raises(ValueError):
            refused()
