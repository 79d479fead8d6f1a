"""Parquet files: columns, class names, shards, rows that are left out, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_sets import encode, picture, write_parquet

from speedk import data
from speedk.data import parquet
from speedk.data.decode import decode
from speedk.data.parquet import read_parquet
from speedk.data.part import number_labels
from speedk.errors import DataError

LABELS = [0, 2, 1, 1, 2, 0, 0]


def write_pair(root, labels=LABELS, test=(0, 1, 2), **options):
    write_parquet(root / "train.parquet", labels, **options)
    write_parquet(root / "test.parquet", list(test), **options)
    return root


def refused(said: str, path) -> None:
    with pytest.raises(DataError) as caught:
        data.load(path=path, progress=False)
    assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("options", [
    {}, {"image_column": "img"}, {"label_column": "fine_label"}, {"plain": True}, {"group": 100}, {"group": 1},
    {"label_type": pa.uint8()}, {"label_type": pa.uint64()},
])
def test_rows_come_in_order_with_their_names(tmp_path, options):
    real = data.load(path=write_pair(tmp_path, **options), progress=False)
    assert real.class_names == ("ant", "bee", "cow") and real.split == "folder"
    assert real.train.labels.tolist() == LABELS and real.test.labels.tolist() == [0, 1, 2]
    for i in range(len(LABELS)):
        assert np.array_equal(real.train.images[i].permute(1, 2, 0).numpy(), np.asarray(picture(i)))


def test_without_names_the_sorted_values_are_the_classes(tmp_path):
    real = data.load(path=write_pair(tmp_path / "n", [30, 4, 4, 30, 5], (5, 4, 30), names=None), progress=False)
    assert real.class_names == ("4", "5", "30") and real.train.labels.tolist() == [2, 0, 0, 2, 1]
    assert real.test.labels.tolist() == [1, 0, 2]
    words = write_pair(tmp_path / "s", ["dog", "cat", "eel"], ("eel", "cat", "dog"), names=None)
    real = data.load(path=words, progress=False)
    assert real.class_names == ("cat", "dog", "eel") and real.train.labels.tolist() == [1, 0, 2]


def test_string_labels_follow_stored_names(tmp_path):
    real = data.load(path=write_pair(tmp_path, ["cow", "ant", "bee"], ("bee", "cow", "ant")), progress=False)
    assert real.class_names == ("ant", "bee", "cow") and real.train.labels.tolist() == [2, 0, 1]
    assert real.test.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize("place", [".", "data", "plain_text"])
def test_shards_are_read_in_order(tmp_path, place):
    images = [encode(picture(i)) for i in range(6)]
    for i in range(3):
        write_parquet(tmp_path / place / f"train-{i:05d}-of-00003.parquet", [0, 1 + i % 2], images[2 * i:2 * i + 2])
    write_parquet(tmp_path / place / "validation-00000-of-00001-a1b2c3.parquet", [2, 1, 0])
    real = data.load(path=tmp_path, progress=False)
    assert real.train.labels.tolist() == [0, 1, 0, 2, 0, 1] and real.test.labels.tolist() == [2, 1, 0]
    for i in range(6):
        assert np.array_equal(real.train.images[i].permute(1, 2, 0).numpy(), np.asarray(picture(i)))
    (tmp_path / place / "train-00001-of-00003.parquet").unlink()
    refused("2 of 3 shards of train: train-00001-of-00003.parquet is missing", tmp_path)


def test_shards_in_a_folder_for_each_part(tmp_path):
    write_parquet(tmp_path / "train" / "0000.parquet", [0, 1])
    write_parquet(tmp_path / "train" / "0001.parquet", [2])
    write_parquet(tmp_path / "validation" / "0000.parquet", [0, 1, 2])
    assert data.load(path=tmp_path, progress=False).train.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("block", [4, 256])
def test_cut_takes_the_rows_of_the_classes_across_shards_groups_and_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(parquet, "BLOCK", block)
    labels = np.random.default_rng(0).integers(0, 7, 40)
    images = [encode(picture(i)) for i in range(40)]
    files = [write_parquet(tmp_path / f"{i}.parquet", labels[i * 20:i * 20 + 20].tolist(),
                           images[i * 20:i * 20 + 20], names="abcdefg", group=6) for i in range(2)]
    part, _ = read_parquet(files, files[:1])
    cut = part.cut([5, 1])
    decoded = decode(cut, 8)
    rows = np.flatnonzero((labels == 5) | (labels == 1))
    assert cut.names == ("f", "b") and decoded.labels.tolist() == [0 if labels[i] == 5 else 1 for i in rows]
    for image, row in zip(decoded.images, rows, strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(picture(row)))
    again = cut.cut([1])
    assert again.names == ("b",) and (again.rows == np.flatnonzero(labels == 1)).all() and not again.labels.any()


def test_null_images_count_as_unreadable(tmp_path):
    cells = [{"bytes": encode(picture(i)), "path": None} for i in range(200)]
    cells[7], cells[9] = None, {"bytes": None, "path": "gone.png"}
    table = pa.table({"image": cells, "label": [0, 1] * 100})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=8)
    write_parquet(tmp_path / "test.parquet", [0, 1], names=None)
    real = data.load(path=tmp_path, progress=False)
    assert len(real.train) == 198
    assert "train.parquet row 7 (empty); train.parquet row 9 (empty)" in real.note


def test_labels_out_of_range_and_hidden(tmp_path):
    refused("label 3 of row 1 of the training part", write_pair(tmp_path / "a", [0, 3, 1, 2]))
    refused("label -1 of row 0 of the test part is not one of the 3 classes (hidden",
            write_pair(tmp_path / "b", test=(-1, -1)))
    refused("label 9 of row 2 of the test part", write_pair(tmp_path / "c", [1, 2], (1, 2, 9), names=None))
    refused("label 'wasp' of row 0", write_pair(tmp_path / "d", ["wasp", "ant"], ("ant",)))
    refused("row 1 of train.parquet has no label", write_pair(tmp_path / "e", [0, None, 1]))
    refused("holds double: labels must be whole numbers", write_pair(tmp_path / "f", [0.0, 1.0]))
    refused("1 of 3 classes have no readable test image: 'cow'", write_pair(tmp_path / "g", test=(0, 1)))


def test_parts_that_disagree(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", [0, 1, 2])
    write_parquet(tmp_path / "a" / "test.parquet", [0, 1, 2], names=("ant", "bee", "wasp"))
    refused("class names of the training and the test part disagree: only one has 'cow', 'wasp'", tmp_path / "a")
    write_parquet(tmp_path / "b" / "train.parquet", [0, 1, 2])
    write_parquet(tmp_path / "b" / "test.parquet", [0, 1, 2], names=("bee", "ant", "cow"))
    refused("they are in another order", tmp_path / "b")
    write_parquet(tmp_path / "c" / "train.parquet", [0, 1], names=None)
    write_parquet(tmp_path / "c" / "test.parquet", ["0", "1"], names=None)
    refused("strings and those of the other are numbers", tmp_path / "c")
    write_parquet(tmp_path / "d" / "train-00000-of-00002.parquet", [0, 1], names=None)
    write_parquet(tmp_path / "d" / "train-00001-of-00002.parquet", ["0", "1"], names=None)
    write_parquet(tmp_path / "d" / "test.parquet", [0, 1], names=None)
    refused("the columns or class names of", tmp_path / "d")
    refused("two classes have the same name, 'ant'", write_pair(tmp_path / "e", names=("ant", "ant", "bee")))


def test_columns_that_are_not_there(tmp_path):
    refused("has no image column: it has picture, label", write_pair(tmp_path / "a", image_column="picture"))
    refused("has no label column", write_pair(tmp_path / "b", label_column="target"))
    table = pa.table({"image": [[1, 2], [3, 4]], "label": [0, 1]})
    (tmp_path / "c").mkdir()
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / "c" / f"{part}.parquet")
    refused("images must be stored as encoded bytes", tmp_path / "c")


def test_damaged_files_are_one_line(tmp_path):
    write_pair(tmp_path)
    whole = (tmp_path / "train.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:len(whole) // 2], whole[:-9] + b"\xff" * 9, b"\0" * len(whole)):
        (tmp_path / "train.parquet").write_bytes(damaged)
        refused("cannot read", tmp_path)


def test_any_bit_flip_is_refused_or_harmless(tmp_path):
    """Damage anywhere ends in DataError or in images of the right shape, never in another exception."""
    write_pair(tmp_path, names=("a", "b", "c"))
    whole = (tmp_path / "train.parquet").read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "train.parquet").write_bytes(damaged)
        try:
            real = data.load(path=tmp_path, progress=False)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert real.train.images.shape == (7, 3, 8, 8)


@pytest.mark.parametrize("metadata", [
    b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": {"names": 3}}}}',
    b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
])
def test_metadata_that_says_nothing_is_ignored(tmp_path, metadata):
    table = pa.table({"image": [encode(picture(i)) for i in range(2)], "label": [0, 1]})
    for part in ("train", "test"):
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / f"{part}.parquet")
    assert data.load(path=tmp_path, progress=False).class_names == ("0", "1")


def test_number_labels_keeps_names_of_one_part():
    labels, names = number_labels({"training": [0, 1], "test": [1, 0]}, {"training": None, "test": ["x", "y"]})
    assert names == ("x", "y") and labels["training"].dtype == np.int64
    with pytest.raises(DataError, match="float64"):
        number_labels({"training": [0.5], "test": [0.5]}, {"training": None, "test": None})


def test_image_bytes_that_are_greyscale(tmp_path):
    images = [encode(Image.new("L", (8, 8), 20 * i)) for i in range(7)]
    write_parquet(tmp_path / "train.parquet", LABELS, images)
    write_parquet(tmp_path / "test.parquet", [0, 1, 2], images[:3])
    real = data.load(path=tmp_path, progress=False)
    assert real.train.images.shape == (7, 1, 8, 8) and real.train.images[3].unique().tolist() == [60]
