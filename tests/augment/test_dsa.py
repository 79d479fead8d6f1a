"""Augmentation: each operation against plain loops in float64, its draws, its gradients, siamese use."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from speedk.augment import _affine, dsa
from speedk.errors import ConfigError
from speedk.geometry import Geometry

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int, channels: int, side: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=generator(seed), dtype=torch.float64)


def parameter(drawn: dsa.Draw, name: str, i: int) -> float:
    values = drawn.parameters[name]
    return values[i if len(values) > 1 else 0].item()


def reference_color(image, drawn, i):
    image = image + parameter(drawn, "brightness", i)
    factor = parameter(drawn, "saturation", i)
    out = image.clone()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            grey = sum(image[:, y, x].tolist()) / len(image)
            for c in range(len(image)):
                out[c, y, x] = (image[c, y, x] - grey) * factor + grey
    mean = out.sum() / out.numel()
    return (out - mean) * parameter(drawn, "contrast", i) + mean


def pixel(image, c, y, x):
    inside = 0 <= y < image.shape[1] and 0 <= x < image.shape[2]
    return image[c, y, x].item() if inside else 0.0


def moved(image, source):
    """The image whose pixel (y, x) is the bilinear sample of `image` at source(y, x); zero outside."""
    out = torch.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            sy, sx = source(y, x)
            y0, x0 = math.floor(sy), math.floor(sx)
            fy, fx = sy - y0, sx - x0
            for c in range(len(image)):
                above = pixel(image, c, y0, x0) * (1 - fx) + pixel(image, c, y0, x0 + 1) * fx
                below = pixel(image, c, y0 + 1, x0) * (1 - fx) + pixel(image, c, y0 + 1, x0 + 1) * fx
                out[c, y, x] = above * (1 - fy) + below * fy
    return out


def reference_crop(image, drawn, i):
    down, right = parameter(drawn, "down", i), parameter(drawn, "right", i)
    return moved(image, lambda y, x: (y - down, x - right))


def reference_flip(image, drawn, i):
    return moved(image, lambda y, x: (y, image.shape[2] - 1 - x)) if parameter(drawn, "flip", i) else image


def reference_cutout(image, drawn, i):
    top, left, hole = parameter(drawn, "top", i), parameter(drawn, "left", i), math.floor(image.shape[1] / 2 + 0.5)
    out = image.clone()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            if top <= y < top + hole and left <= x < left + hole:
                out[:, y, x] = 0
    return out


def reference_scale(image, drawn, i):
    centre = (image.shape[1] - 1) / 2
    sy, sx = parameter(drawn, "y", i), parameter(drawn, "x", i)
    return moved(image, lambda y, x: ((y - centre) * sy + centre, (x - centre) * sx + centre))


def reference_rotate(image, drawn, i):
    centre, angle = (image.shape[1] - 1) / 2, math.radians(parameter(drawn, "degrees", i))
    cos, sin = math.cos(angle), math.sin(angle)
    return moved(image, lambda y, x: ((x - centre) * sin + (y - centre) * cos + centre,
                                      (x - centre) * cos - (y - centre) * sin + centre))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", dsa.ALL)
@pytest.mark.parametrize(("channels", "side"), [(3, 8), (1, 7), (3, 12)])
@pytest.mark.parametrize("shared", [False, True])
def test_against_plain_loops(op, channels, side, shared, device):
    images = batch(5, channels, side)
    drawn = dsa.draw(5, side, generator(3), shared=shared, ops=(op,))
    reference = globals()[f"reference_{op}"]
    expected = torch.stack([reference(image, drawn, i) for i, image in enumerate(images)])
    torch.testing.assert_close(dsa.apply(images.to(device), drawn).cpu(), expected, rtol=1e-9, atol=1e-9)
    if op != "flip" or not shared:
        assert not torch.equal(expected, images)


def test_saturation_leaves_grey_images_alone():
    drawn = dsa.draw(4, 8, generator(), ops=("color",))
    plain = dsa.Draw("color", 8, {**drawn.parameters, "saturation": torch.ones(4)})
    assert torch.equal(dsa.apply(batch(4, 1, 8), drawn), dsa.apply(batch(4, 1, 8), plain))
    assert not torch.allclose(dsa.apply(batch(4, 3, 8), drawn), dsa.apply(batch(4, 3, 8), plain))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", dsa.ALL)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(op, shared, device):
    images = batch(3, 3, 6).to(device).requires_grad_()
    drawn = dsa.draw(3, 6, generator(2), shared=shared, ops=(op,))
    assert torch.autograd.gradcheck(lambda x: dsa.apply(x, drawn), (images,))
    if op not in ("scale", "rotate") or device == "cuda":
        assert torch.autograd.gradgradcheck(lambda x: dsa.apply(x, drawn), (images,))


def as_on_a_gpu(images, matrix):
    return _affine._Sample.apply(images, matrix, False)


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (2, 3, 7, 7), (2, 1, 5, 9), (2, 2, 1, 1), (1, 2, 1, 4), (0, 3, 4, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_sampling_of_a_gpu_is_grid_sample(shape, shared):
    """Maps that turn, shear, mirror, leave the image by far and hit its pixels exactly."""
    images = torch.randn(shape, generator=generator(1), dtype=torch.float64).requires_grad_()
    turned = torch.randn(max(shape[0], 1), 2, 2, generator=generator(2), dtype=torch.float64) * 0.8
    for matrix in (turned, 5 * turned, torch.eye(2).double().expand_as(turned), -torch.eye(2).double()[None]):
        matrix = matrix[:1] if shared or not shape[0] else matrix
        want, got = _affine.affine(images, matrix), as_on_a_gpu(images, matrix)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert got.stride() == torch.empty(shape).stride()  # of one channel, too, which is contiguous in any case
        slope = torch.randn(shape, generator=generator(3), dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad(out, images, slope) for out in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_sampling_of_a_gpu_is_differentiable_any_number_of_times():
    images, matrix = batch(2, 2, 4).requires_grad_(), torch.randn(2, 2, 2, generator=generator(4)).double()
    assert torch.autograd.gradcheck(lambda x: as_on_a_gpu(x, matrix), (images,))
    assert torch.autograd.gradgradcheck(lambda x: as_on_a_gpu(x, matrix).square(), (images,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", dsa.ALL)
def test_gradients_are_the_same_bits_each_time(op, dtype, device):
    images = torch.randn(40, 3, 16, 16, generator=generator(5)).to(device, dtype).requires_grad_()
    slope = torch.randn(images.shape, generator=generator(6)).to(device, dtype)
    drawn = dsa.draw(40, 16, generator(6), ops=(op,))
    (first,), *others = (torch.autograd.grad(dsa.apply(images, drawn), images, slope) for _ in range(5))
    assert first.dtype == dtype and all(torch.equal(first, other) for other, in others)
    if op in ("scale", "rotate"):
        matrix = torch.randn(40, 2, 2, generator=generator(7)).to(device)
        (first,), *others = (torch.autograd.grad(as_on_a_gpu(images, matrix), images, slope) for _ in range(5))
        assert first.dtype == dtype and all(torch.equal(first, other) for other, in others)


@pytest.mark.parametrize("op", dsa.ALL)
def test_siamese_batches_are_treated_alike(op):
    drawn = dsa.draw(7, 8, generator(4), shared=True, ops=(op,))
    one, many = batch(1, 3, 8), batch(6, 3, 8)
    many[4] = one[0]
    torch.testing.assert_close(dsa.apply(many, drawn)[4], dsa.apply(one, drawn)[0], rtol=1e-12, atol=1e-12)
    assert drawn.select(torch.tensor([0, 5])).parameters.keys() == drawn.parameters.keys()


@pytest.mark.parametrize("op", dsa.ALL)
def test_a_part_of_a_batch_is_replayed_as_in_the_whole(op):
    images, drawn = batch(6, 3, 8), dsa.draw(6, 8, generator(5), ops=(op,))
    index = torch.tensor([4, 0, 3])
    whole = dsa.apply(images, drawn)
    torch.testing.assert_close(dsa.apply(images[index], drawn.select(index)), whole[index], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dsa.apply(images[2:5], drawn.select(slice(2, 5))), whole[2:5], rtol=1e-12, atol=1e-12)


def test_a_draw_is_a_function_of_the_generator_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, again = (dsa.draw(4, Geometry(10, 3, 32), generator(8)) for _ in range(2))
    assert first.op == again.op
    assert all(torch.equal(first.parameters[k], again.parameters[k]) for k in first.parameters)
    assert torch.equal(torch.get_rng_state(), state)


def test_operations_are_drawn_uniformly():
    source = generator(0)
    counts = Counter(dsa.draw(1, 8, source).op for _ in range(3000))
    assert set(counts) == set(dsa.ALL)
    assert all(abs(n - 500) < 4 * math.sqrt(3000 * 5 / 36) for n in counts.values())


@pytest.mark.parametrize(("op", "side", "ranges"), [
    ("color", 32, {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}),
    ("crop", 32, {"down": (-4, 4), "right": (-4, 4)}),
    ("crop", 28, {"down": (-4, 4), "right": (-4, 4)}),
    ("cutout", 32, {"top": (-8, 24), "left": (-8, 24)}),
    ("cutout", 10, {"top": (-2, 7), "left": (-2, 7)}),
    ("flip", 32, {"flip": (0, 1)}),
    ("scale", 32, {"x": (1 / 1.2, 1.2), "y": (1 / 1.2, 1.2)}),
    ("rotate", 32, {"degrees": (-15, 15)}),
])
def test_the_published_ranges_are_filled(op, side, ranges):
    drawn = dsa.draw(8000, side, generator(1), ops=(op,))
    assert drawn.parameters.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        values = drawn.parameters[name].double()
        slack = 0 if drawn.parameters[name].dtype == torch.int64 else 0.005 * (high - low)
        assert low <= values.min() <= low + slack and high - slack <= values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.025 * (high - low)


def test_errors_name_the_value():
    with pytest.raises(ConfigError, match="'colour'.*did you mean 'color'"):
        dsa.draw(1, 8, generator(), ops=("colour",))
    with pytest.raises(ConfigError, match="no augmentation"):
        dsa.draw(1, 8, generator(), ops=())
    drawn = dsa.draw(4, 8, generator(), ops=("crop",))
    with pytest.raises(ValueError, match=r"\[B, C, 8, 8\]"):
        dsa.apply(batch(4, 3, 9), drawn)
    with pytest.raises(ValueError, match="3 images but the draw is for 4"):
        dsa.apply(batch(3, 3, 8), drawn)
