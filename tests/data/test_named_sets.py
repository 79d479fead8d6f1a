"""Named data sets from local files: the catalogue's facts, classes cut by index, and which split is said."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from small_sets import encode, picture, write_parquet, write_tree

from speedk import data
from speedk.data import catalogue, load
from speedk.errors import ConfigError, DataError
from speedk.geometry import Geometry

SUBSETS = {
    "imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "imagewoof": (193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "imagemeow": (281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "imagesquawk": (84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "imagefruit": (953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "imageyellow": (309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}
WNIDS = [f"n{10_000_000 + 7 * i}" for i in range(1000)]


def refused(said: str, *args, **options) -> None:
    with pytest.raises(DataError) as caught:
        load(*args, progress=False, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A thousand class folders; class i holds the pictures i and 1000 + i, and 5000 + i for validation."""
    root = tmp_path_factory.mktemp("imagenet")
    for part in ("train", "val"):
        for wnid in WNIDS:
            (root / part / wnid).mkdir(parents=True)
    for i in sorted({i for indices in SUBSETS.values() for i in indices}):
        picture(i).save(root / "train" / WNIDS[i] / "a.png")
        picture(1000 + i).save(root / "train" / WNIDS[i] / "b.png")
        picture(5000 + i).save(root / "val" / WNIDS[i] / "c.png")
    (root / "test").mkdir()  # ImageNet's test images have no classes
    picture(0).save(root / "test" / "ILSVRC2012_test_00000001.png")
    return root


def test_catalogue_says_what_the_protocol_says():
    assert data.names() == ["digits", "cifar10", "cifar100", "tinyimagenet", "imagenette", "imagewoof", "imagefruit",
                            "imagemeow", "imagesquawk", "imageyellow"]
    for name, indices in SUBSETS.items():
        entry = data.entry(name)
        assert entry.ilsvrc == indices and len(entry.ilsvrc_names) == 10 and entry.geometry.resolution == 128
        assert (entry.normaliser, entry.statistics) == ("channel", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        entry = data.entry(name)
        assert entry.normaliser == "zca" and entry.geometry.classes == classes and entry.geometry.resolution == 32
        assert entry.statistics == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    tiny = data.entry("tinyimagenet")
    assert (tiny.geometry.classes, tiny.geometry.resolution, tiny.normaliser) == (200, 64, "channel")
    splits = {name: data.entry(name).split for name in SUBSETS}
    assert {name for name, split in splits.items() if split == "fastai"} == {"imagenette", "imagewoof"}
    assert data.entry("imagenette").counts == (9469, 3925)
    with pytest.raises(ConfigError, match="did you mean 'imagewoof'"):
        data.entry("imagewof")


@pytest.mark.parametrize("name", SUBSETS)
def test_subsets_are_cut_by_index_in_class_order(imagenet, name):
    real = load(name, imagenet, resolution=8, progress=False)
    assert real.split == "ilsvrc" and real.class_names == data.entry(name).ilsvrc_names
    assert real.train.labels.tolist() == [i // 2 for i in range(20)] and real.test.labels.tolist() == list(range(10))
    for k, index in enumerate(SUBSETS[name]):
        for image, seed in ((real.train.images[2 * k], index), (real.train.images[2 * k + 1], 1000 + index),
                            (real.test.images[k], 5000 + index)):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(seed)))
    assert real.normaliser.mean == (0.485, 0.456, 0.406)


def test_subsets_take_their_resolution_and_say_that_images_were_enlarged(imagenet):
    real = load("imagefruit", imagenet, split="ilsvrc", progress=False)
    assert real.train.images.shape == (20, 3, 128, 128)
    assert real.note == "images with sides down to 8 pixels enlarged to 128x128"
    refused("whole ImageNet, which has no fastai split: download https://", "imagenette", imagenet, split="fastai")


def test_a_folder_may_hold_several_sets_by_their_names(tmp_path):
    ten = [f"class{i}" for i in range(10)]
    for name in ("cifar10", "imagenette"):
        write_parquet(tmp_path / name / "train.parquet", list(range(10)), names=ten)
        write_parquet(tmp_path / name / "test.parquet", list(range(10)), names=ten)
    real = load("cifar10", tmp_path, normaliser="channel", progress=False)
    assert real.fingerprint == load("cifar10", tmp_path / "cifar10", normaliser="channel", progress=False).fingerprint
    assert load("imagenette", tmp_path, resolution=8, progress=False).name == "imagenette"
    refused(f"there is no cifar100 in {tmp_path}, only cifar10, imagenette", "cifar100", tmp_path)
    refused("holds several data sets, cifar10, imagenette: give one of them", None, tmp_path)
    shutil.rmtree(tmp_path / "imagenette")  # what is left is not taken for another set
    refused(f"there is no cifar100 in {tmp_path}, only cifar10", "cifar100", tmp_path)
    (tmp_path / "cifar10").rename(tmp_path / "plain_text")
    assert load("cifar10", tmp_path, normaliser="channel", progress=False).fingerprint == real.fingerprint


@pytest.mark.parametrize("names", [None, [f"class{i}, other" for i in range(1000)]])
def test_subsets_are_cut_out_of_parquet(tmp_path, names):
    if names:
        for i, said in zip(SUBSETS["imagenette"], data.entry("imagenette").ilsvrc_names, strict=True):
            names[i] = f"{said.replace(' ', '_')}, and more"
    labels = np.random.default_rng(0).permutation(1000)
    images = [encode(picture(int(i))) for i in labels]
    write_parquet(tmp_path / "train.parquet", labels.tolist(), images, names=names, group=100)
    write_parquet(tmp_path / "validation.parquet", list(range(1000)), [encode(picture(9))] * 1000, names=names,
                  group=50)
    write_parquet(tmp_path / "test.parquet", [-1] * 4, names=names)  # hidden labels, as in ImageNet's own
    real = load("imagenette", tmp_path, resolution=8, progress=False)
    assert real.split == "ilsvrc" and real.class_names[3] == "chain saw" and len(real.train) == len(real.test) == 10
    for image, label in zip(real.train.images, real.train.labels.tolist(), strict=True):
        index = SUBSETS["imagenette"][label]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(index)))


def test_a_thousand_classes_in_another_order_are_refused(tmp_path):
    names = sorted(f"class{i}" for i in range(1000))
    write_parquet(tmp_path / "train.parquet", list(range(1000)), [b"x"] * 1000, names=names, group=1000)
    write_parquet(tmp_path / "val.parquet", list(range(1000)), [b"x"] * 1000, names=names, group=1000)
    refused("not in ImageNet's order: class 0 is 'class0', not 'tench'", "imagenette", tmp_path)


def test_ten_classes_are_taken_as_they_are(tmp_path):
    names = [f"x{i}" for i in range(10)]
    write_tree(tmp_path, names=names, train=2, test=1, test_folder="val")
    real = load("imagemeow", tmp_path, resolution=8, progress=False)
    assert real.class_names == tuple(names) and real.split == "folder"
    refused("is not the split 'ilsvrc' of imagemeow", "imagemeow", tmp_path, split="ilsvrc")
    refused("holds 20 training and 10 test images", "imagenette", tmp_path, split="fastai")


def test_wordnet_folders_of_fastai_get_their_names(tmp_path):
    entry = data.entry("imagewoof")
    write_tree(tmp_path / "imagewoof2-160", names=sorted(entry.wnids), train=1, test=1, test_folder="val")
    real = load("imagewoof", tmp_path, resolution=8, progress=False)
    assert real.class_names[:3] == ("Shih-Tzu", "Rhodesian ridgeback", "beagle") and len(set(real.class_names)) == 10


def test_fifty_test_images_a_class_are_the_papers_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", list(range(10)), names=[*"abcdefghij"])
    write_parquet(tmp_path / "val.parquet", list(range(10)) * 50, [encode(picture(0))] * 500, names=[*"abcdefghij"])
    assert load("imagenette", tmp_path, resolution=8, split="ilsvrc", progress=False).split == "ilsvrc"


def test_wrong_number_of_classes(tmp_path):
    write_tree(tmp_path / "a")
    refused("has 3 classes, not the 10 of cifar10", "cifar10", tmp_path / "a")
    refused("has 3 classes, not the 10 of imagefruit, nor the 1000 of ImageNet", "imagefruit", tmp_path / "a")


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A cifar10 of 8 px whose published counts are 40 and 20."""
    small = dataclasses.replace(data.entry("cifar10"), counts=(40, 20), geometry=Geometry(10, 3, 8))
    monkeypatch.setitem(catalogue.CATALOGUE, "cifar10", small)
    write_tree(tmp_path, names=[*"abcdefghij"], train=4, test=2)
    return tmp_path


def test_counts_tell_the_official_split(small_cifar):
    real = load("cifar10", small_cifar, progress=False)
    assert real.split == "official" and real.note == "" and real.normaliser.kind == "zca"
    assert real.normaliser.eps == 0.1 and real.normaliser.data == real.fingerprint
    assert load("cifar10", small_cifar, normaliser="channel", progress=False).normaliser.mean == (.4914, .4822, .4465)
    (small_cifar / "train" / "a" / "000.png").unlink()
    assert load("cifar10", small_cifar, progress=False).split == "folder"


def test_cifar_from_jpeg_says_so(small_cifar):
    image = small_cifar / "train" / "a" / "000.png"
    image.write_bytes(encode(picture(0), "JPEG"))
    assert "stored as JPEG: they are not pixel-identical" in load("cifar10", small_cifar, progress=False).note


def test_official_cifar_takes_test_before_validation(small_cifar):
    before = load("cifar10", small_cifar, normaliser="channel", progress=False).fingerprint
    shutil.copytree(small_cifar / "train", small_cifar / "validation")
    assert load("cifar10", small_cifar, normaliser="channel", progress=False).fingerprint == before


def test_zca_that_is_too_large_is_refused(tmp_path):
    write_tree(tmp_path, names=[*"abcdefghij"], train=1, test=1)
    refused("use normaliser=channel", "imagenette", tmp_path, normaliser="zca")
