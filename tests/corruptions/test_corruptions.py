"""The corruptions against their published definitions, each in plain loops, scipy, colorsys or Pillow."""

from __future__ import annotations

import colorsys
import io
import itertools
import math

import numpy as np
import pytest
import severities
import torch
from PIL import Image
from scipy import ndimage

from speedk import corruptions
from speedk.corruptions import blur, digital, filters, noise, weather
from speedk.errors import ConfigError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenes(count: int = 6, channels: int = 3, side: int = 32) -> torch.Tensor:
    """uint8 images with large and small structure, as photographs have."""
    maps = filters.plasma(count * channels, side, 1.5, rng(3)).reshape(count, channels, side, side)
    return (maps * 255).round().to(torch.uint8)


def psnr(changed: torch.Tensor, images: torch.Tensor) -> float:
    return -10 * math.log10(float(((changed.double() - images.double()) / 255).square().mean()))


def test_there_are_the_fifteen_in_their_order():
    assert corruptions.NAMES == (
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_a_seed_decides_everything(name, channels):
    images = scenes(3, channels)
    before = images.clone()
    first, second, other = (corruptions.corrupt(images, name, 3, seed) for seed in (0, 0, 1))
    assert first.dtype == torch.uint8 and first.shape == images.shape and torch.equal(images, before)
    assert torch.equal(first, second) and not torch.equal(first, images)
    fixed = name in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(first, other) == fixed
    if not fixed:  # images that are alike do not get the same noise
        same = corruptions.corrupt(images[:1].expand(2, -1, -1, -1).contiguous(), name, 3)
        assert not torch.equal(same[0], same[1])


def test_blocks_have_streams_of_their_own(monkeypatch):
    images = scenes(4, 1, 16)[:1].expand(4, -1, -1, -1).contiguous()
    monkeypatch.setattr(corruptions, "_BLOCK", 2 * 16 * 16)
    made = corruptions.corrupt(images, "gaussian_noise", 1)
    assert len({image.numpy().tobytes() for image in made}) == 4
    assert torch.equal(made[:2], corruptions.corrupt(images[:2], "gaussian_noise", 1))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "motion_blur",
                                  "zoom_blur", "snow", "fog", "brightness", "contrast", "pixelate", "jpeg_compression"])
def test_the_more_severe_the_further_from_the_image(name, side):
    images = scenes(6, 3, side)
    found = [psnr(corruptions.corrupt(images, name, severity), images) for severity in corruptions.SEVERITIES]
    assert found[4] < found[0] - 1
    if name not in ("snow", "fog"):  # whose published steps trade amount for size or roughness
        assert all(later < earlier + 0.3 for earlier, later in itertools.pairwise(found)), found


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_parameters_are_the_published_ones(name, side):
    columns = severities.PUBLISHED[name][(32, 64, 224).index(side)].split(", ")
    listed = [[float(value) for value in column.split()] for column in columns]
    scale = [(1.0,)] * 5 if name == "defocus_blur" else [()] * 5
    expected = [(*row, *rest) for row, rest in zip(zip(*listed, strict=True), scale, strict=True)]
    assert np.asarray(corruptions.levels(name, side)) == pytest.approx(np.asarray(expected), rel=1e-12)


def test_lengths_scale():
    assert corruptions.levels("defocus_blur", 448)[2] == (6, 0.5, 2)
    assert corruptions.levels("motion_blur", 16)[0] == (3, 0.5)
    assert corruptions.levels("snow", 448)[0] == (0.1, 0.3, 6, 0.5, 20, 8, 0.8)
    assert corruptions.levels("glass_blur", 96)[3] == pytest.approx((1.05, 3, 1))
    assert corruptions.levels("elastic_transform", 128)[4] == pytest.approx((29.28 / 1.75, 2.44 / 1.75, 4.88 / 1.75))


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_noises_have_the_published_strength(severity):
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    x = 128 / 255
    (deviation,), (photons,), (amount,) = (corruptions.levels(f"{kind}_noise", 32)[severity - 1]
                                           for kind in ("gaussian", "shot", "impulse"))
    unit = grey.float() / 255
    for made, expected in ((noise.gaussian_noise(unit, rng(), deviation), deviation),
                           (noise.shot_noise(unit, rng(), photons), math.sqrt(x / photons))):
        assert abs(float(made.double().std()) / expected - 1) < 0.01
        assert abs(float(made.double().mean()) - x) < 5 * expected / math.sqrt(grey.numel())
    made = corruptions.corrupt(grey, "impulse_noise", severity)
    assert set(made.unique().tolist()) == {0, 128, 255}
    for value in (0, 255):
        part = float((made == value).double().mean())
        assert abs(part - amount / 2) < 5 * math.sqrt(amount / 2 / grey.numel())


def test_poisson_noise_has_its_steps():
    made = noise.shot_noise(torch.full((2, 1, 8, 8), 0.5), rng(), 10).double() * 10
    torch.testing.assert_close(made, made.round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "reflect"])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.05, 4.0), (0.4, 4.0), (1.7, 3.0), (6.4, 3.0), (40.0, 3.0)])
def test_the_gaussian_is_scipys(sigma, truncate, mode):
    images = torch.rand(2, 3, 16, 16)
    expected = ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode=mode, truncate=truncate)
    made = filters.gaussian(images, sigma, truncate, mirrored=mode == "reflect")
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("radius", "sigma"), [(0.3, 0.4), (1.5, 0.1), (3, 0.5), (8, 0.5), (10, 0.5)])
def test_defocus_is_the_mean_over_a_soft_disk(radius, sigma):
    size, half = max(8, int(radius)), 1 if radius <= 8 else 2
    hard = np.array([[float(x * x + y * y <= radius**2) for x in range(-size, size + 1)]
                     for y in range(-size, size + 1)])
    edge = np.array([[math.exp(-(x * x + y * y) / (2 * sigma**2)) for x in range(-half, half + 1)]
                     for y in range(-half, half + 1)])
    soft = ndimage.convolve(hard / hard.sum(), edge / edge.sum(), mode="mirror")
    kernel = filters.disk(radius, sigma)
    trimmed = size - len(kernel) // 2
    np.testing.assert_allclose(np.pad(kernel.numpy(), trimmed), soft, atol=1e-6)
    assert float(kernel.double().sum()) == pytest.approx({8: 1.013, 10: 1.011}.get(radius, 1), abs=1e-3)
    images = torch.rand(2, 1, 32, 32)
    expected = ndimage.convolve(images[1, 0].double().numpy(), soft, mode="mirror")
    np.testing.assert_allclose(blur.defocus_blur(images, rng(), radius, sigma)[1, 0].numpy(), expected, atol=1e-5)


def test_a_scaled_kernel_keeps_its_weight_and_its_width():
    kernel = filters.disk(6, 0.5).double()
    assert torch.equal(filters.scaled(kernel.float(), 1.0), kernel.float())
    half = filters.scaled(kernel.float(), 0.5).double()
    assert abs(float(half.sum()) - 1) < 1e-6 and torch.allclose(half, half.flip(0).T)
    place, small = (torch.arange(len(k)).double() - len(k) // 2 for k in (kernel, half))
    spread, scaled = (float((k.sum(0) * at**2).sum()) for k, at in ((kernel, place), (half, small)))
    assert abs(scaled - spread / 4) < 0.25  # sharing between two pixels adds a quarter at most


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_glass_copies_pixels_one_after_another(sigma):
    side, reach, rounds, count = 8, 2, 2, 2
    images = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1))
    made = blur.glass_blur(images, rng(5), sigma, reach, rounds)
    soft = ndimage.gaussian_filter(images[:, 0].double().numpy(), (0, sigma, sigma), mode="nearest")
    assert np.abs(soft * 255 - np.rint(soft * 255)).min() > 1e-3  # else rounding may cut off the other way
    expected, draws = np.floor(soft * 255) / 255, rng(5)
    for _ in range(rounds):
        for row in range(side - reach, reach, -1):
            moves = draws.integers(-reach, reach, (2, side, count))
            for column in range(side - reach, reach, -1):
                for image in range(count):
                    down, right = moves[:, column - 1, image]
                    expected[image, row, column] = expected[image, row + down, column + right]
    expected = ndimage.gaussian_filter(expected, (0, sigma, sigma), mode="nearest")
    np.testing.assert_allclose(made[:, 0].numpy(), expected, atol=1e-5)
    assert not torch.equal(made, images)


def test_a_trail_is_a_weighted_mean_along_its_direction():
    images = torch.rand(3, 2, 12, 12)
    degrees, radius, sigma = np.array([0.0, 90.0, -30.0]), 3, 2.0
    made = filters.trail(images, radius, sigma, degrees)
    weights = [math.exp(-i * i / (2 * sigma**2)) for i in range(7)]
    for b, angle in enumerate(np.deg2rad(degrees)):
        expected = np.zeros((12, 12))
        for y in range(12):
            for x in range(12):
                for i, w in enumerate(weights):
                    row = min(max(y + round(i * math.sin(angle)), 0), 11)
                    column = min(max(x + round(i * math.cos(angle)), 0), 11)
                    expected[y, x] += w / sum(weights) * float(images[b, 1, row, column])
        np.testing.assert_allclose(made[b, 1].numpy(), expected, atol=1e-5)
    constant = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(filters.trail(constant, 6, 2.0, np.array([20.0])), constant)


@pytest.mark.parametrize("side", [9, 32])
@pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.3, 2.25])
def test_zoom_crops_whole_pixels_and_enlarges_them(factor, side):
    images = torch.rand(1, 1, side, side)
    crop = math.ceil(side / factor)
    first = (side - crop) // 2
    middle = images[0, 0, first:first + crop, first:first + crop].double().numpy()
    large = ndimage.zoom(middle, factor, order=1)
    first = (len(large) - side) // 2
    matrix = filters.zoom_matrix(side, factor)
    np.testing.assert_allclose((matrix @ images @ matrix.T)[0, 0].numpy(),
                               large[first:first + side, first:first + side], atol=1e-5)
    if factor == 1:
        assert torch.equal(matrix, torch.eye(side))


def test_zoom_blur_is_the_mean_over_the_factors():
    images = torch.rand(1, 1, 9, 9)
    expected, factors = images.clone(), np.arange(1, 1.11, 0.01)
    for factor in factors:
        matrix = filters.zoom_matrix(9, factor)
        expected += matrix @ images @ matrix.T
    torch.testing.assert_close(blur.zoom_blur(images, rng(), 1.11, 0.01), expected / (len(factors) + 1))


@pytest.mark.parametrize(("name", "low", "high"), [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_trails_have_the_published_directions(name, low, high, monkeypatch):
    asked = []
    monkeypatch.setattr(filters, "trail", lambda images, radius, sigma, degrees: asked.append(degrees) or images)
    corruptions.corrupt(torch.zeros(3000, 1, 8, 8, dtype=torch.uint8), name, 2)
    degrees, = asked
    assert degrees.shape == (3000,) and low <= degrees.min() < low + 1 and high - 1 < degrees.max() <= high
    assert abs(degrees.mean() - (low + high) / 2) < 2


def test_values_are_cut_off_between_two_steps_where_the_published_files_are():
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    assert set(corruptions.corrupt(images, "brightness", 1).unique().tolist()) == {112}  # of 112.75
    for name in ("contrast", "zoom_blur", "motion_blur", "pixelate", "elastic_transform", "glass_blur"):
        assert set(corruptions.corrupt(images, name, 3).unique().tolist()) == {100}
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(filters.cut_off(ramp / 255) * 255, ramp.float())
    assert torch.equal(filters.cut_off((ramp + 0.9) / 255) * 255, ramp.float())
    torch.testing.assert_close(filters.rounded((ramp[..., :15] + 0.9) / 255) * 255, ramp[..., :15] + 1.0)


class Steady:
    """In place of a random generator: every draw is the same part of its range."""

    def __init__(self, part: float) -> None:
        self.part = part

    def uniform(self, low, high, shape=None):
        return np.full(shape, low + (high - low) * self.part)


def test_plasma_is_midpoint_displacement():
    size, decay, part = 8, 1.7, 0.8
    heights, step, reach = np.zeros((size, size)), size, 1.0
    shift = 2 * part - 1
    while step > 1:
        half = step // 2
        for y in range(0, size, step):
            for x in range(0, size, step):
                corners = [heights[(y + dy) % size, (x + dx) % size] for dy in (0, step) for dx in (0, step)]
                heights[y + half, x + half] = sum(corners) / 4 + reach * shift
        for y in range(0, size, half):
            for x in range((y // half + 1) % 2 * half, size, step):
                around = [heights[(y + dy) % size, (x + dx) % size]
                          for dy, dx in ((-half, 0), (half, 0), (0, -half), (0, half))]
                heights[y, x] = sum(around) / 4 + reach * shift
        step, reach = half, reach / decay**2
    expected = (heights - heights.min()) / (heights.max() - heights.min())
    np.testing.assert_allclose(filters.plasma(1, size, decay, Steady(part))[0].numpy(), expected, atol=1e-5)


def test_plasma_is_from_0_to_1_and_the_rougher_the_slower_it_decays():
    rough, smooth = (filters.plasma(20, 32, decay, rng()) for decay in (1.4, 3))
    for maps in (rough, smooth):
        assert torch.equal(maps.amin((1, 2)), torch.zeros(20)) and torch.equal(maps.amax((1, 2)), torch.ones(20))
    assert rough.diff(dim=2).abs().mean() > 2 * smooth.diff(dim=2).abs().mean()
    assert filters.plasma(2, 24, 2, rng()).shape == (2, 24, 24)


def test_fog_keeps_the_brightest_value_and_adds_plasma():
    images = torch.rand(3, 3, 16, 16) * 0.7
    made = weather.fog(images, rng(4), 1.5, 2)
    layer = filters.plasma(3, 16, 2, rng(4))
    for b in range(3):
        top = float(images[b].max())
        expected = (images[b].double() + 1.5 * layer[b].double()) * top / (top + 1.5)
        torch.testing.assert_close(made[b].double(), expected, rtol=1e-5, atol=1e-6)


def test_snow_whitens_and_adds_flakes():
    images = torch.rand(4, 3, 32, 32)
    grey = (images.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    white = 0.7 * images.double() + 0.3 * torch.maximum(images.double(), grey * 1.5 + 0.5)
    none = weather.snow(images, rng(), -9.0, 0.1, 1.0, 0.5, 8, 3, 0.7)
    torch.testing.assert_close(none.double(), white, rtol=1e-5, atol=1e-6)
    flakes = weather.snow(images, rng(), 0.1, 0.3, 1.5, 0.5, 8, 3, 0.7).double() - white
    assert flakes.min() > -1e-6 and flakes.max() > 0.1
    torch.testing.assert_close(flakes, flakes.rot90(2, (2, 3)), rtol=0, atol=1e-6)  # laid on twice, turned by half
    torch.testing.assert_close(flakes[:, 0], flakes[:, 2], rtol=0, atol=1e-6)


def test_frost_adds_ice():
    images = torch.rand(4, 3, 32, 32)
    layer = weather.frost(images, rng(2), 0.8, 0.5) - 0.8 * images
    ice = weather.ice(4, 32, rng(2))
    torch.testing.assert_close(layer[:, 2:], 0.5 * ice, rtol=0, atol=1e-6)
    assert ice.min() >= 0 and ice.max() <= 1 and 0.2 < ice.mean() < 0.6 and ice.std() > 0.1
    assert (layer[:, 0] <= layer[:, 2] + 1e-6).all()  # bluish
    grey = weather.frost(images[:, :1], rng(2), 0.8, 0.5)
    assert grey.shape == (4, 1, 32, 32)


def test_brightness_raises_the_value_of_hsv():
    images = torch.rand(1, 3, 8, 8)
    images[0, :, 0, 0] = 0
    made = weather.brightness(images, rng(), 0.3)[0]
    for y in range(8):
        for x in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].double().tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
            np.testing.assert_allclose(made[:, y, x].numpy(), expected, atol=1e-5)


def test_contrast_shrinks_towards_each_channels_mean():
    images = torch.rand(2, 3, 8, 8)
    mean = images.double().mean((2, 3), keepdim=True)
    expected = 0.15 * images.double() + 0.85 * mean
    torch.testing.assert_close(digital.contrast(images, rng(), 0.15).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("strength", "sigma", "shift"), [(0, 0, 2.5), (3.2, 1.3, 1.6)])
def test_elastic_moves_three_points_and_then_each_pixel(strength, sigma, shift):
    side = 16
    images = torch.rand(2, 1, side, side)
    made = digital.elastic_transform(images, rng(6), strength, sigma, shift)
    draws = rng(6)
    points = np.array([(13, 13), (13, 3), (3, 3)], float)  # a third of the side from the centre, 8
    moved = points + draws.uniform(-shift, shift, (2, 3, 2))
    fields = draws.uniform(-1, 1, (2, 2, side, side)) if strength else None
    y, x = np.mgrid[:side, :side].astype(float)
    for b in range(2):
        # the affine map back, its coefficients by Cramer's rule for each coordinate
        (x0, y0), (x1, y1), (x2, y2) = moved[b]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        back = []
        for p0, p1, p2 in points.T:
            along = ((p1 - p0) * (y2 - y0) - (p2 - p0) * (y1 - y0)) / area
            across = ((x1 - x0) * (p2 - p0) - (x2 - x0) * (p1 - p0)) / area
            back.append(p0 + along * (x - x0) + across * (y - y0))
        expected = ndimage.map_coordinates(images[b, 0].double().numpy(), back[::-1], order=1, mode="mirror")
        if strength:
            dx, dy = (strength * ndimage.gaussian_filter(f, sigma, mode="reflect", truncate=3) for f in fields[b])
            expected = ndimage.map_coordinates(expected, (y + dy, x + dx), order=1, mode="reflect")
        np.testing.assert_allclose(made[b, 0].numpy(), expected, atol=1e-4)


def test_elastic_without_strength_is_the_image():
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(digital.elastic_transform(images, rng(), 0, 0, 0), images, rtol=0, atol=1e-5)


def test_pixelate_takes_means_of_blocks():
    images = scenes(2, 3, 32)
    means = images.double().reshape(2, 3, 8, 4, 8, 4).mean((3, 5))
    made = digital.pixelate(images.float() / 255, rng(), 0.25) * 255
    assert (made - means.repeat_interleave(4, 2).repeat_interleave(4, 3)).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels):
    images = scenes(2, channels, 32)
    made = digital.jpeg_compression(images.float() / 255, rng(), 40) * 255
    pixels = images[1].permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, "JPEG", quality=40)
    expected = np.asarray(Image.open(stream)).reshape(32, 32, channels)
    np.testing.assert_allclose(made[1].permute(1, 2, 0).numpy(), expected, atol=1e-3)


def test_what_does_not_exist_is_one_line():
    images = scenes(1)
    with pytest.raises(ConfigError, match="did you mean 'fog'"):
        corruptions.corrupt(images, "fogg", 1)
    with pytest.raises(ConfigError, match="severity 6"):
        corruptions.corrupt(images, "fog", 6)
    with pytest.raises(ValueError, match="uint8"):
        corruptions.corrupt(images.float(), "fog", 1)
