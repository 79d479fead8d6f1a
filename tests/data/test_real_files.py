"""The real CIFAR-10 and Imagenette, where they are at hand."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from speedk import data
from speedk.data import zca


@pytest.fixture(scope="module")
def cifar(real_folder):
    """CIFAR-10 without its ZCA, which is fitted here to a part of it."""
    return data.load("cifar10", real_folder / "cifar10", normaliser="channel", progress=False)


@pytest.fixture(scope="module")
def imagenette(real_folder):
    return data.load("imagenette", real_folder / "imagenette", resolution=32, progress=False)


def test_cifar10_is_whole(cifar):
    assert cifar.class_names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                 "truck")
    assert cifar.split == "official" and "JPEG" in cifar.note and cifar.geometry.pixels == 3072
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert torch.bincount(cifar.test.labels).tolist() == [1000] * 10
    published = torch.tensor([0.4914, 0.4822, 0.4465])
    assert (cifar.train.images.float().mean((0, 2, 3)) / 255 - published).abs().max() < 2e-3


def test_imagenette_is_fastais_split(imagenette):
    assert imagenette.class_names == data.entry("imagenette").ilsvrc_names and imagenette.split == "fastai"
    assert (len(imagenette.train), len(imagenette.test), imagenette.note) == (9469, 3925, "")
    counts = torch.bincount(imagenette.train.labels)
    assert (int(counts.min()), int(counts.max())) == (858, 993)


def test_rows_are_those_of_the_file(cifar, imagenette, real_folder):
    for real, name, rows, side in ((cifar, "cifar10", (0, 1, 999, 1000, 31_415, 49_999), 32),
                                   (imagenette, "imagenette", (0, 1, 947, 948, 5000, 9468), 32)):
        table = pq.read_table(real_folder / name / "train.parquet")
        for row in rows:
            cell = table.slice(row, 1).to_pylist()[0]
            image = Image.open(io.BytesIO(cell["image"]["bytes"])).convert("RGB")
            expected = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
            assert np.array_equal(real.train.images[row].permute(1, 2, 0).numpy(), expected)
            assert int(real.train.labels[row]) == cell["label"]


def test_zca_of_real_images_against_an_independent_decomposition(cifar):
    """2,000 images at 8 px (192 values): float64, from the singular values of the centred data."""
    small = torch.nn.functional.avg_pool2d(cifar.train.images[:2000].float(), 4).round().to(torch.uint8)
    fitted = zca.fit(small, cifar.fingerprint, progress=False)
    rows = small.flatten(1).double().numpy() / 255
    mean = rows.mean(0)
    _, s, v = np.linalg.svd(rows - mean, full_matrices=False)
    weights = s**2 / (len(rows) - 1)
    matrix = (v.T / np.sqrt(weights + 0.1)) @ v
    inverse = (v.T * np.sqrt(weights + 0.1)) @ v
    assert np.abs(fitted.matrix.double().numpy() - matrix).max() < 2.0**-18
    assert np.abs(fitted.inverse.double().numpy() - inverse).max() < 2.0**-18
    whitened = fitted.normalise(small[:500])
    assert np.abs(whitened.flatten(1).double().numpy() - (rows[:500] - mean) @ matrix).max() < 2e-4
    assert (fitted.unit(whitened) * 255).round().to(torch.uint8).equal(small[:500])


def test_sampling_a_step_of_ten_classes(cifar):
    generator = torch.Generator().manual_seed(0)
    batches = [cifar.sample(label, 256, generator) for label in range(10)]
    assert all(batch.shape == (256, 3, 32, 32) for batch in batches)
    assert abs(torch.cat(batches).mean()) < 0.1
