"""patchify, unpatchify and tokens_to_images against permutes and pixel_shuffle."""

import pytest
import torch
from cases import LARGE, MIDDLE
from measuring import DEVICE
from torch.nn.functional import fold, linear, unfold

from speedk.ops import patchify, tokens_to_images, unpatchify
from speedk.ops.patches import patchify_reference, tokens_to_images_reference, unpatchify_reference

CASES = pytest.mark.parametrize("case", [MIDDLE, LARGE], ids=lambda c: c.name)


@CASES
def bench_patchify(contest, case):
    images = case.images()

    def unfolded():
        columns = unfold(images, case.patch, stride=case.patch)  # channel slowest
        return columns.view(case.N, case.channels, -1, case.J).permute(0, 3, 2, 1).reshape(case.N, case.J, case.L)

    contest("patchify", case.name, {"speedk": lambda: patchify(images, case.patch)},
            {"permute": lambda: patchify_reference(images, case.patch), "unfold": unfolded},
            moved=2 * 4 * images.numel(), yardsticks={"copy": images.clone})


@CASES
def bench_unpatchify(contest, case):
    tokens = patchify_reference(case.images(), case.patch)

    def folded():
        columns = tokens.view(case.N, case.J, -1, case.channels).permute(0, 3, 2, 1).reshape(case.N, case.L, case.J)
        return fold(columns, (case.side, case.side), case.patch, stride=case.patch)

    contest("unpatchify", case.name, {"speedk": lambda: unpatchify(tokens, case.channels, case.patch)},
            {"permute": lambda: unpatchify_reference(tokens, case.channels, case.patch), "fold": folded},
            moved=2 * 4 * tokens.numel(), yardsticks={"copy": tokens.clone})


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@CASES
def bench_tokens_to_images(contest, case, direction):
    state = torch.randn(case.N, case.J, case.D, device=DEVICE)
    weight, bias = torch.randn(case.L, case.D, device=DEVICE), torch.randn(case.L, device=DEVICE)

    def fused(state, weight, bias):
        return tokens_to_images(state, weight, bias, case.channels, case.patch)

    def permuted(state, weight, bias):
        return tokens_to_images_reference(state, weight, bias, case.channels, case.patch)

    def shuffled(state, weight, bias):
        grid = linear(state, weight, bias)
        grid = grid.view(case.N, case.J, -1, case.channels).permute(0, 3, 2, 1).flatten(1, 2)
        side = round(case.J**0.5)
        return torch.nn.functional.pixel_shuffle(grid.reshape(case.N, -1, side, side), case.patch)

    leaves, d_images = [state, weight, bias], case.images()
    moved, flops = 4 * (state.numel() + d_images.numel()), 2 * case.N * case.J * case.D * case.L

    def both(function):
        return lambda: torch.autograd.grad(function(*leaves), leaves, d_images)

    if direction == "fwd":
        contest("tokens_to_images", case.name, {"speedk": lambda: fused(*leaves)},
                {"linear + permute": lambda: permuted(*leaves), "linear + pixel_shuffle": lambda: shuffled(*leaves)},
                moved=moved, flops=flops)
        return
    for leaf in leaves:
        leaf.requires_grad_()
    contest("tokens_to_images fwd+bwd", case.name, {"speedk": both(fused)},
            {"linear + permute": both(permuted), "linear + pixel_shuffle": both(shuffled)},
            moved=moved + 4 * (d_images.numel() + 2 * state.numel()), flops=3 * flops)
