"""Image folders: what is found, in which order, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import NAMES, encode, picture, write_parquet, write_tree

from speedk import data
from speedk.errors import DataError


def refused(said: str, *args, **options) -> str:
    with pytest.raises(DataError) as caught:
        data.load(*args, progress=False, **options)
    text = str(caught.value)
    assert said in text and "\n" not in text, text
    return text


@pytest.mark.parametrize("test_folder", ["test", "val", "validation", "valid", "Testing"])
def test_tree_is_read_in_order(tmp_path, test_folder):
    write_tree(tmp_path / "animals", test_folder=test_folder)
    real = data.load(path=tmp_path / "animals", progress=False)
    assert (real.name, real.split, real.note, real.class_names) == ("animals", "folder", "", NAMES)
    assert (real.geometry.classes, real.geometry.channels, real.geometry.resolution) == (3, 3, 8)
    assert real.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and real.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i in range(12):  # the seeds count the training images in the order of the folders
        assert np.array_equal(real.train.images[i].permute(1, 2, 0).numpy(), np.asarray(picture(i)))


def test_same_data_one_folder_down_or_nested_in_the_class(tmp_path):
    write_tree(tmp_path / "a")
    write_tree(tmp_path / "b" / "inner")
    write_tree(tmp_path / "c")
    for folder in (tmp_path / "c").glob("*/*"):
        (folder / "images").mkdir()
        for image in folder.glob("*.png"):
            image.rename(folder / "images" / image.name)
    marks = {data.load(path=tmp_path / name, progress=False).fingerprint for name in "abc"}
    assert len(marks) == 1


def test_litter_is_left_alone(tmp_path):
    write_tree(tmp_path)
    before = data.load(path=tmp_path, progress=False).fingerprint
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "__MACOSX").mkdir()
    (tmp_path / "train" / "labels.csv").write_text("a,b")
    (tmp_path / "train" / "ant" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "train" / "ant" / "._000.png").write_bytes(b"x")
    assert data.load(path=tmp_path, progress=False).fingerprint == before


def test_greyscale_folder_has_one_channel(tmp_path):
    write_tree(tmp_path, mode="L")
    real = data.load(path=tmp_path, progress=False)
    assert real.geometry.channels == 1 and real.train.images.shape == (12, 1, 8, 8)
    assert np.array_equal(real.train.images[5, 0].numpy(), np.asarray(picture(5, mode="L")))
    picture(99).save(tmp_path / "test" / "ant" / "000.png")
    mixed = data.load(path=tmp_path, progress=False)
    assert mixed.geometry.channels == 3
    assert np.array_equal(mixed.train.images[5, 1].numpy(), np.asarray(picture(5, mode="L")))


def test_resolution_stretches(tmp_path):
    write_tree(tmp_path, side=(24, 12))
    real = data.load(path=tmp_path, resolution=6, progress=False)
    expected = picture(0, (24, 12)).resize((6, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(real.train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected)) and real.note == ""
    larger = data.load(path=tmp_path, resolution=16, progress=False)
    assert larger.train.images.shape == (12, 3, 16, 16)
    assert larger.note == "images with sides down to 12 pixels enlarged to 16x16"


def test_sizes_without_a_resolution(tmp_path):
    write_tree(tmp_path / "wide", side=(8, 6))
    refused("ant/000.png is 8x6, not square: give a resolution", path=tmp_path / "wide")
    write_tree(tmp_path / "mixed")
    picture(0, 9).save(tmp_path / "mixed" / "train" / "bee" / "001.png")
    refused("bee/001.png is 9x9, the first is 8x8", path=tmp_path / "mixed")
    write_tree(tmp_path / "parts")
    for image in (tmp_path / "parts" / "test").glob("*/*.png"):
        picture(0, 10).save(image)
    refused("is 10x10, the first is 8x8", path=tmp_path / "parts")


def test_folders_that_hold_nothing_of_use(tmp_path):
    refused(f"there is no folder {tmp_path / 'none'}", path=tmp_path / "none")
    (tmp_path / "file.parquet").write_bytes(b"")
    refused("is a file", path=tmp_path / "file.parquet")
    (tmp_path / "empty").mkdir()
    refused("is empty", path=tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    refused("has no training part", path=tmp_path / "other")
    write_tree(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "test")
    refused("has no test part: it needs test, validation or val beside train", path=tmp_path / "half")
    (tmp_path / "half" / "val").mkdir()
    refused("holds no class folders", path=tmp_path / "half")


def test_ambiguous_folders(tmp_path):
    write_tree(tmp_path / "160px")
    write_tree(tmp_path / "320px")
    refused("several data sets, 160px, 320px", path=tmp_path)
    write_tree(tmp_path / "twice")
    shutil.copytree(tmp_path / "twice" / "train", tmp_path / "twice" / "training")
    refused("train and training", path=tmp_path / "twice")
    write_tree(tmp_path / "kinds")
    shutil.rmtree(tmp_path / "kinds" / "test")
    write_parquet(tmp_path / "kinds" / "test.parquet", [0, 1, 2])
    refused("different kinds", path=tmp_path / "kinds")


def test_test_comes_before_validation_and_that_is_said(tmp_path):
    write_tree(tmp_path)
    real = data.load(path=tmp_path, progress=False)
    shutil.copytree(tmp_path / "train", tmp_path / "validation")
    both = data.load(path=tmp_path, progress=False)
    assert both.fingerprint == real.fingerprint and both.note == "the part 'validation' is not used"


def test_classes_must_be_two_or_more_agree_and_have_images(tmp_path):
    write_tree(tmp_path / "one", names=("ant",))
    refused("one class only, 'ant'", path=tmp_path / "one")
    write_tree(tmp_path / "extra")
    shutil.rmtree(tmp_path / "extra" / "test" / "bee")
    (tmp_path / "extra" / "test" / "wasp").mkdir()
    text = refused("disagree", path=tmp_path / "extra")
    assert "test/ has no 'bee'" in text and "train/ has no 'wasp'" in text
    for part, title in (("train", "training"), ("test", "test")):
        root = write_tree(tmp_path / f"lacks-{part}")
        shutil.rmtree(root / part / "cow")
        (root / part / "cow").mkdir()
        refused(f"1 of 3 classes have no readable {title} image: 'cow'", path=root)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a" * 201, "\udcff"])
def test_a_class_name_that_no_file_can_hold_is_refused_before_anything_runs(tmp_path, name):
    refused(f"the class name {ascii(name)[:40]}", path=write_tree(tmp_path / "set", names=(name, "cow")))


def test_a_folder_name_of_any_bytes_is_no_reason_to_fail(tmp_path):
    real = data.load(path=write_tree(tmp_path / "set\udcff\n1", names=("ant", "cow")))
    assert real.name == "set\\udcff 1"


def test_unreadable_files_are_counted_named_and_bounded(tmp_path):
    write_tree(tmp_path, names=("ant", "bee"), train=100, test=2)
    whole = data.load(path=tmp_path, progress=False)
    (tmp_path / "train" / "bee" / "007.png").write_bytes(b"not an image")
    data_of = (tmp_path / "train" / "ant" / "003.png").read_bytes()
    (tmp_path / "train" / "ant" / "003.png").write_bytes(data_of[:len(data_of) // 2])
    real = data.load(path=tmp_path, progress=False)
    assert real.note.startswith("2 of 200 training images left out as unreadable: ant/003.png (")
    assert "bee/007.png (" in real.note and real.describe()["train"] == 198
    keep = torch.ones(200, dtype=torch.bool)
    keep[[3, 107]] = False
    assert torch.equal(real.train.images, whole.train.images[keep])
    assert torch.equal(real.train.labels, whole.train.labels[keep])
    (tmp_path / "train" / "ant" / "004.png").write_bytes(b"")
    refused("more than 1% of the 200 training images cannot be read: ant/003.png", path=tmp_path)


def test_a_class_whose_only_test_image_is_unreadable(tmp_path):
    write_tree(tmp_path, names=("ant", "bee"), train=2, test=110)
    for image in sorted((tmp_path / "test" / "bee").glob("*.png"))[1:]:
        image.unlink()
    (tmp_path / "test" / "bee" / "000.png").write_bytes(b"x")
    refused("1 of 2 classes have no readable test image: 'bee'", path=tmp_path)


def test_first_image_unreadable_does_not_decide_the_size(tmp_path):
    write_tree(tmp_path, names=("ant", "bee"), train=60)
    (tmp_path / "train" / "ant" / "000.png").write_bytes(b"x")
    assert data.load(path=tmp_path, progress=False).geometry.resolution == 8
    for image in (tmp_path / "train").glob("*/*.png"):
        image.write_bytes(b"x")
    refused("the training part holds no readable image", path=tmp_path)


def test_equal_pixels_cannot_be_normalised(tmp_path):
    write_tree(tmp_path)
    for image in (tmp_path / "train").glob("*/*.png"):
        Image.new("RGB", (8, 8), (1, 2, 3)).save(image)
    refused("all training pixels of a channel are equal", path=tmp_path)


def test_annotated_validation_folder(tmp_path):
    """The layout of tiny-imagenet-200: images nested in the class folders, the validation part in one folder."""
    write_tree(tmp_path, train=3)
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test" / "images").mkdir(parents=True)
    (tmp_path / "test" / "images" / "test_0.JPEG").write_bytes(encode(picture(0)))
    (tmp_path / "val" / "images").mkdir(parents=True)
    rows = [("val_0.JPEG", "cow"), ("val_1.JPEG", "ant"), ("val_2.JPEG", "bee"), ("val_3.JPEG", "cow")]
    for i, (name, _) in enumerate(rows):
        (tmp_path / "val" / "images" / name).write_bytes(encode(picture(50 + i)))
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("".join(f"{name}\t{label}\t0\t0\t62\t62\n" for name, label in rows))
    from speedk.data.decode import decode
    from speedk.data.locate import locate

    train, test = locate(tmp_path, prefer_validation=True).read()
    decoded = decode(test, 8)
    assert train.names == NAMES and decoded.labels.tolist() == [2, 0, 1, 2]
    assert np.array_equal(decoded.images[3].transpose(1, 2, 0), np.asarray(picture(53)))
    table.write_text("val_0.JPEG\twasp\n")
    with pytest.raises(DataError, match="line 1 of .*val_annotations.txt names no class"):
        locate(tmp_path, prefer_validation=True).read()
