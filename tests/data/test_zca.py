"""ZCA: values against a float64 reference and Kornia, equal bytes, and the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from speedk import data
from speedk.data import zca
from speedk.errors import DataError

MARK = "ab" * 32


def images(count=150, side=4, seed=0) -> torch.Tensor:
    """Smooth random images: neighbouring pixels are correlated, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    noise = torch.rand(count, 3, side, side, generator=generator)
    return ((0.8 * smooth + 0.2 * noise) * 255).round().to(torch.uint8)


def reference(x: torch.Tensor, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, matrix and inverse in float64, from the singular values of the centred data."""
    rows = x.numpy().reshape(len(x), -1).astype(np.float64) / 255
    mean = rows.mean(0)
    _, s, v = np.linalg.svd(rows - mean)
    spectrum = np.zeros(rows.shape[1])
    spectrum[:len(s)] = s**2 / (len(x) - 1)
    return mean, (v.T / np.sqrt(spectrum + eps)) @ v, (v.T * np.sqrt(spectrum + eps)) @ v


@pytest.mark.parametrize("count, eps", [(150, 0.1), (20, 0.1), (150, 1e-3)])
def test_matrix_is_that_of_the_reference(count, eps):
    x = images(count)
    mean, matrix, inverse = reference(x, eps)
    found = zca.fit(x, MARK, eps, progress=False)
    half_grid = 2.0**-19 + 1e-10
    assert np.abs(found.mean.numpy() - mean).max() < 1e-7
    assert np.abs(found.matrix.double().numpy() - matrix).max() <= half_grid
    assert np.abs(found.inverse.double().numpy() - inverse).max() <= half_grid


def test_agrees_with_kornia():
    kornia = pytest.importorskip("kornia", reason="kornia is not installed")
    x = images(300)
    theirs = kornia.enhance.ZCAWhitening(eps=0.1, compute_inv=True).fit(x.float() / 255)
    ours = zca.fit(x, MARK, 0.1, progress=False)
    assert (ours.matrix - theirs.transform_matrix).abs().max() < 1e-5
    assert (ours.inverse - theirs.transform_inv).abs().max() < 1e-5
    z = theirs(x.float() / 255)
    assert (ours.normalise(x) - z).abs().max() < 5e-5
    assert (ours.unit(z) - theirs.inverse_transform(z).clamp(0, 1)).abs().max() < 5e-5


def test_whitened_covariance_has_no_direction_above_one():
    x = images(2000)
    z = zca.fit(x, MARK, 0.1, progress=False).normalise(x).double().flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(z.T))
    spectrum = torch.linalg.eigvalsh(torch.cov((x.double() / 255).flatten(1).T))
    assert z.mean(0).abs().max() < 1e-4 and (values - spectrum / (spectrum + 0.1)).abs().max() < 1e-4


def test_round_trip_gives_the_pixels_back():
    x = images(150)
    normaliser = zca.fit(x, MARK, progress=False)
    z = normaliser.normalise(x)
    assert z.shape == x.shape and z.dtype == torch.float32 and z.is_contiguous()
    assert (normaliser.unit(z) * 255).round().to(torch.uint8).equal(x)
    assert (normaliser.normalise(x.float() / 255) - z).abs().max() < 1e-5
    assert normaliser.unit(100 * z).min() == 0 and normaliser.unit(100 * z).max() == 1
    assert normaliser.normalise(x[:0]).shape == (0, 3, 4, 4) and normaliser.unit(z[:0]).shape == (0, 3, 4, 4)


def test_normalise_works_in_chunks_and_leaves_its_input_alone(monkeypatch):
    x = images(150)
    normaliser = zca.fit(x, MARK, progress=False)
    whole = normaliser.normalise(x)
    monkeypatch.setattr(zca, "_ROWS", 32)
    unit = x.float() / 255
    before = unit.clone()
    assert (normaliser.normalise(x) - whole).abs().max() < 1e-6
    assert (normaliser.normalise(unit) - whole).abs().max() < 1e-5 and torch.equal(unit, before)
    flipped = x.transpose(2, 3)  # not contiguous
    assert (normaliser.normalise(flipped) - normaliser.normalise(flipped.contiguous())).abs().max() == 0


def test_equal_bytes_whatever_the_threads_and_the_chunks(monkeypatch):
    x = images(400, side=5)
    threads = torch.get_num_threads()
    hashes = set()
    try:
        for count, rows in ((1, 2048), (2, 64), (4, 37)):
            torch.set_num_threads(count)
            monkeypatch.setattr(zca, "_ROWS", rows)
            hashes.add(zca.fit(x, MARK, progress=False).sha256)
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1
    fitted = zca.fit(x, MARK, progress=False)
    for matrix in (fitted.matrix, fitted.inverse):
        steps = matrix.double() * 2**18  # coarser than any rounding error of the decomposition
        assert torch.equal(steps, steps.round())
    x[7, 0, 0, 0] ^= 1
    assert zca.fit(x, MARK, progress=False).sha256 not in hashes


def test_too_large_or_too_few():
    with pytest.raises(DataError, match="3x128x128 images needs a matrix of 49152x49152: use normaliser=channel"):
        zca.fit(torch.zeros(2, 3, 128, 128, dtype=torch.uint8), MARK)
    with pytest.raises(DataError, match="two training images"):
        zca.fit(images(1), MARK)


def test_cache_keeps_and_gives_back(cache, monkeypatch):
    x = images()
    first = zca.fit_or_cached(x, MARK, progress=False)
    assert [path.name for path in cache.iterdir()] == [f"zca-{MARK[:32]}-0.1.safetensors"]
    monkeypatch.setattr(zca, "fit", lambda *_: pytest.fail("fitted again"))
    second = zca.fit_or_cached(x, MARK, progress=False)
    third = data.from_description(json.loads(json.dumps(first.describe())))
    for again in (second, third):
        assert torch.equal(again.matrix, first.matrix) and torch.equal(again.inverse, first.inverse)
        assert torch.equal(again.mean, first.mean) and again.describe() == first.describe()


def test_another_eps_or_another_set_is_another_file(cache):
    x = images()
    for mark, eps in ((MARK, 0.1), (MARK, 0.2), ("cd" * 32, 0.1)):
        zca.fit_or_cached(x, mark, eps, progress=False)
    assert len(list(cache.iterdir())) == 3


def test_not_at_hand_says_how_to_get_it(cache):
    described = zca.fit(images(), MARK, progress=False).describe()
    with pytest.raises(DataError) as caught:
        data.from_description(described)
    assert "load the same real data once" in str(caught.value) and str(cache) in str(caught.value)
    zca.fit_or_cached(images(), MARK, progress=False)
    assert data.from_description(described).sha256 == described["matrix"]
    with pytest.raises(DataError, match="is not the one described"):
        data.from_description({**described, "matrix": "0" * 64})


def test_damaged_cache_is_refused_and_mended(cache):
    x = images()
    fitted = zca.fit_or_cached(x, MARK, progress=False)
    path = next(cache.iterdir())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    other = zca.fit_or_cached(images(side=5), "cd" * 32, progress=False)
    assert other.shape == (3, 5, 5)
    for damaged in (b"", whole[:100], whole[:-1], bytes(flipped), b"\xff" * 64,
                    (cache / f"zca-{'cd' * 16}-0.1.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged"):
            data.from_description(fitted.describe())
        assert zca.fit_or_cached(x, MARK, progress=False).sha256 == fitted.sha256
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_a_warning(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("SPEEDK_CACHE", str(cache / "file"))
    with pytest.warns(UserWarning, match="could not be kept .*SPEEDK_CACHE"):
        assert zca.fit_or_cached(images(), MARK, progress=False).shape == (3, 4, 4)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    from speedk.data import cache as module

    assert module.folder() != tmp_path / "speedk"
    monkeypatch.delenv("SPEEDK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.folder() == tmp_path / "speedk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.folder() == tmp_path / ".cache" / "speedk"


def test_loaded_data_sample_from_one_whitened_copy(monkeypatch):
    real = data.load("digits", normaliser="zca", resolution=8, progress=False)
    whole = real.normaliser.normalise(real.train.images)
    calls = []
    normalise = real.normaliser.normalise
    monkeypatch.setattr(real.normaliser, "normalise", lambda x: calls.append(len(x)) or normalise(x))
    drawn = [real.sample(label, 5, torch.Generator().manual_seed(label)) for label in range(10)]
    assert calls == [1438]
    for label, images in enumerate(drawn):
        members = whole[real.train.labels == label].flatten(1)
        assert (images.flatten(1)[:, None] == members).all(-1).any(1).all()
    monkeypatch.setattr("speedk.data.real.KEEP_BYTES", 1000)
    unkept = data.load("digits", normaliser="zca", resolution=8, progress=False)
    assert (unkept.sample(3, 5, torch.Generator().manual_seed(3)) - drawn[3]).abs().max() < 1e-5
    assert unkept._kept == {}


def test_threads_share_the_whitened_copy(monkeypatch):
    real = data.load("digits", normaliser="zca", resolution=8, progress=False)
    calls, normalise = [], real.normaliser.normalise

    def slow(images):
        calls.append(len(images))
        time.sleep(0.1)
        return normalise(images)

    monkeypatch.setattr(real.normaliser, "normalise", slow)
    index = torch.arange(8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: real.normalised(part, index), ["test"] * 4))
    assert calls == [359] and all(torch.equal(images, found[0]) for images in found)


def test_kornia_is_not_needed():
    code = ("import sys; sys.modules['kornia'] = None\n"
            "from speedk import data; import torch\n"
            "print(data.load('digits', normaliser='zca', resolution=4, progress=False).normaliser.kind)\n"
            "print('datasets' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["zca", "False"]
