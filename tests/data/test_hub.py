"""The hub's path, as far as it goes without a network: local folders and a local cache in the hub's own formats."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from small_sets import encode, picture, write_parquet

from speedk import data
from speedk.data import catalogue
from speedk.errors import DataError

NAMES = [*"abcdefghij"]


def test_without_datasets_one_line_says_what_to_do():
    code = ("import sys; sys.modules['datasets'] = None\n"
            "from speedk import data\n"
            "for name in data.names()[1:]:\n"
            "    try: data.load(name, progress=False)\n"
            "    except data.load.__globals__['DataError'] as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and done.stderr == ""
    for name, line in zip(data.names()[1:], lines, strict=True):
        assert line.startswith(f"{name} comes through the package `datasets`, which is not installed: pip install")
        assert "--data DIR (data= in Python)" in line and ("hf download" in line or "https://" in line)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, with its caches in `tmp_path` and no network."""
    package = pytest.importorskip("datasets", reason="the package datasets is not installed")
    import huggingface_hub.constants

    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return package


def with_hub(monkeypatch, name: str, **changes) -> None:
    entry = data.entry(name)
    hub = dataclasses.replace(entry.hub, **changes)
    monkeypatch.setitem(catalogue.CATALOGUE, name, dataclasses.replace(entry, hub=hub, counts=(20, 10)))


@pytest.mark.parametrize("test", ["test", "valid"])
def test_a_repository_of_parquet_is_read_through_datasets(datasets, tmp_path, monkeypatch, capsys, test):
    folder = tmp_path / "repository"
    images = [encode(picture(i, 32)) for i in range(20)]
    for i in range(2):
        write_parquet(folder / "data" / f"train-{i:05d}-of-00002.parquet", list(range(10)),
                      images[10 * i:10 * i + 10], names=NAMES, image_column="img")
    write_parquet(folder / "data" / f"{test}-00000-of-00001.parquet", list(range(10)), images[:10], names=NAMES,
                  image_column="img")
    with_hub(monkeypatch, "cifar10", repository=str(folder), test=test)
    real = data.load("cifar10", normaliser="channel")
    assert real.split == "official" and real.class_names == tuple(NAMES)
    assert f"cifar10: from {folder} through Hugging Face datasets" in capsys.readouterr().err
    local = data.load("cifar10", folder, normaliser="channel", progress=False)
    assert real.fingerprint == local.fingerprint
    for i in range(20):
        assert np.array_equal(real.train.images[i].permute(1, 2, 0).numpy(), np.asarray(picture(i, 32)))


def test_a_column_or_a_split_that_is_not_there(datasets, tmp_path, monkeypatch):
    write_parquet(tmp_path / "r" / "train.parquet", list(range(10)), names=NAMES)
    write_parquet(tmp_path / "r" / "test.parquet", list(range(10)), names=NAMES)
    with_hub(monkeypatch, "cifar10", repository=str(tmp_path / "r"))
    with pytest.raises(DataError, match="has no column 'img': it has image, label"):
        data.load("cifar10", progress=False)
    with_hub(monkeypatch, "cifar10", repository=str(tmp_path / "r"), image="image", test="holdout")
    with pytest.raises(DataError, match="holds the splits train, test, not 'holdout'"):
        data.load("cifar10", progress=False)


def snapshot(root, repository: str, revision: str):
    """An empty snapshot of `repository` in a hub cache, as a download leaves it."""
    store = root / "hub" / f"datasets--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (store / "refs" / revision).parent.mkdir(parents=True)
    (store / "refs" / revision).write_text(commit)
    return store / "snapshots" / commit


def test_fastai_comes_from_the_parquet_export_in_the_cache(datasets, tmp_path, monkeypatch):
    place = snapshot(tmp_path, "frgfm/imagenette", "refs/convert/parquet")
    images = [encode(picture(i, (20, 16))) for i in range(20)]
    for size in ("160px", "320px"):
        write_parquet(place / size / "train" / "0000.parquet", list(range(10)) * 2, images, names=NAMES)
        write_parquet(place / size / "validation" / "0000.parquet", list(range(10)), images[:10], names=NAMES)
    with_hub(monkeypatch, "imagenette")
    real = data.load("imagenette", resolution=16, progress=False)
    assert real.split == "fastai" and real.train.images.shape == (20, 3, 16, 16) and real.class_names == tuple(NAMES)
    assert real.fingerprint == data.load("imagenette", place / "160px", resolution=16, progress=False).fingerprint
    assert data.load("imagenette", resolution=200, progress=False).geometry.resolution == 200
    with pytest.raises(DataError, match="no files like full_size/train"):
        data.load("imagenette", resolution=400, progress=False)


def test_imagenet_in_the_cache_is_cut(datasets, tmp_path):
    place = snapshot(tmp_path, "ILSVRC/imagenet-1k", "main")
    for part in ("train", "validation"):
        for i in range(2):
            write_parquet(place / "data" / f"{part}-{i:05d}-of-00002.parquet", list(range(500 * i, 500 * i + 500)),
                          [encode(picture(4))] * 500, names=[f"{i}" for i in range(1000)], group=100)
    write_parquet(place / "data" / "test-00000-of-00001.parquet", [-1], names=None)
    for name, split in (("imagefruit", None), ("imagenette", "ilsvrc")):
        real = data.load(name, split=split, resolution=8, progress=False)
        assert real.split == "ilsvrc" and real.class_names == data.entry(name).ilsvrc_names
        assert sorted(real.train.labels.tolist()) == list(range(10)) == sorted(real.test.labels.tolist())
    (place / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 shards of train"):
        data.load("imagefruit", progress=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tinyimagenet", "imagenette", "imagefruit"])
def test_offline_and_not_found_says_what_to_download_and_where_to_put_it(datasets, name):
    with pytest.raises(DataError) as caught:
        data.load(name, progress=False)
    text = str(caught.value)
    assert text.startswith(f"{name} is not in the cache of `datasets` and could not be fetched (") and "\n" not in text
    assert text.endswith("and give it: --data DIR (data= in Python)") and data.entry(name).download in text
