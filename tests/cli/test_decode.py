"""speedk decode: what other programs read is what the file holds."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from making import header
from PIL import Image

import speedk
from speedk import data
from speedk.cli import main
from speedk.cli.decode import folder_names


def line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def expected(file):
    """uint8 [N, H, W, C] and labels."""
    loaded = speedk.load(file)
    images = loaded.images() * 0.25 + 0.5
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy(), loaded.labels.numpy()


def pixels(image):
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def test_png_is_an_image_folder(file, tmp_path, capsys):
    out = tmp_path / "images"
    assert main(["decode", str(file), "--out", str(out)]) == 0
    assert "6 images in 3 classes" in capsys.readouterr().out
    images, labels = expected(file)
    found = [(pixels(Image.open(path)), label)
             for label, folder in enumerate(sorted(out.iterdir())) for path in sorted(folder.iterdir())]
    assert [p.name for p in sorted(out.iterdir())] == ["ant", "bee", "cat"]
    assert [label for _, label in found] == labels.tolist()
    assert all(np.array_equal(a, b) for (a, _), b in zip(found, images, strict=True))


def test_parquet_in_the_layout_of_datasets(file, tmp_path):
    out = tmp_path / "images"
    assert main(["decode", str(file), "--out", str(out), "--format", "parquet"]) == 0
    table = pq.read_table(out / "train.parquet")
    images, labels = expected(file)
    assert table["label"].to_pylist() == labels.tolist()
    decoded = [pixels(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    assert all(np.array_equal(a, b) for a, b in zip(decoded, images, strict=True))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_our_own_reader_reads_them(form, file, tmp_path):
    out = tmp_path / "both"
    out.mkdir()
    assert main(["decode", str(file), "--out", str(tmp_path / "train"), "--format", form]) == 0
    if form == "png":
        for part in ("train", "test"):
            (out / part).symlink_to(tmp_path / "train")
    else:
        for part in ("train", "test"):
            (out / f"{part}.parquet").symlink_to(tmp_path / "train" / "train.parquet")
    real = data.load(path=out, progress=False)
    images, labels = expected(file)
    channels = images.shape[-1]
    assert real.class_names == ("ant", "bee", "cat") and real.train.labels.tolist() == labels.tolist()
    assert np.array_equal(real.train.images[:, :channels].permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize("space", ["normalised", "unit"])
def test_npz_rounds_nothing(space, file, tmp_path, capsys):
    out = tmp_path / "arrays"
    assert main(["decode", str(file), "--out", str(out), "--format", "npz", "--space", space]) == 0
    said = capsys.readouterr().out
    assert "pictures" in said if space == "unit" else "what networks train on" in said
    loaded = speedk.load(file)
    with np.load(out / "distilled.npz", allow_pickle=False) as found:
        assert found["images"].dtype == np.float32 and found["labels"].dtype == np.int64
        assert np.array_equal(found["images"], loaded.images(space).numpy())
        assert np.array_equal(found["labels"], loaded.labels.numpy())
        assert found["class_names"].tolist() == ["ant", "bee", "cat"] and found["space"] == space


def test_nothing_is_overwritten(file, tmp_path, capsys):
    out = tmp_path / "used"
    out.mkdir()
    assert main(["decode", str(file), "--out", str(out)]) == 0  # empty is as good as new
    capsys.readouterr()
    before = sorted(out.rglob("*"))
    for form in ("png", "parquet", "npz"):
        assert main(["decode", str(file), "--out", str(out), "--format", form]) == 1
        assert "is not an empty folder" in line(capsys)
    assert main(["decode", str(file), "--out", str(file)]) == 1
    assert "choose another --out" in line(capsys)
    assert main(["decode", str(file), "--out", str(file / "x")]) == 1
    assert "not a folder" in line(capsys)
    assert main(["decode", str(file), "--out", str(tmp_path / "new"), "--space", "unit"]) == 1
    assert "--space is for npz" in line(capsys)
    assert sorted(out.rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["distilled.safetensors", "used"]


def test_a_failure_leaves_nothing(file, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speedk.pictures.png", fail)
    assert main(["decode", str(file), "--out", str(tmp_path / "a")]) == 1
    assert "No space left on device; free some space" in line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["distilled.safetensors"]


def test_the_zca_inverse_is_not_at_hand(save_pixels, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    zca = {"kind": "zca", "eps": 0.1, "shape": [3, 8, 8], "data": "a" * 64, "matrix": "b" * 64}
    path = save_pixels(["a", "b"], zca)
    assert main(["decode", str(path), "--out", str(tmp_path / "a")]) == 1
    assert "ZCA" in line(capsys)
    assert not (tmp_path / "a").exists()
    assert main(["decode", str(path), "--out", str(tmp_path / "b"), "--format", "npz"]) == 0


def test_folder_names_keep_the_order_of_labels_and_stay_in_their_folder():
    assert folder_names(["ant", "bee"]) == (["ant", "bee"], False)
    assert folder_names(["bee", "ant"]) == (["0_bee", "1_ant"], True)
    assert folder_names(["../../etc", "/abs", "..", "a\\b", "nul\0"])[0] == [
        "0__.._etc", "1__abs", "2_", "3_a_b", "4_nul_"]
    assert folder_names(["Cat", "cat"])[1]  # one folder where the file system does not tell case
    many, numbered = folder_names([f"c{i}" for i in range(200)])
    assert numbered and many == sorted(many) and len(set(many)) == 200


def test_hostile_class_names_write_inside_the_folder(save_pixels, tmp_path):
    path = save_pixels(["../escape", "..", "/tmp/abs"])
    assert main(["decode", str(path), "--out", str(tmp_path / "in" / "images")]) == 0
    written = [p for p in tmp_path.rglob("*.png")]
    assert len(written) == 6 and all(tmp_path / "in" / "images" == p.parent.parent for p in written)


def test_learned_labels_go_along(tmp_path, capsys, monkeypatch):
    """Where labels were learned, parquet and npz hold them and png says that it does not."""
    import speedk.distillation.artifact as artifact

    monkeypatch.setattr(artifact.Distilled, "labels", property(lambda self: torch.eye(3)[self.classes] * 0.5))
    from speedk.distillation.parameterizations import pixels
    from speedk.geometry import Geometry

    made = pixels.Pixels(pixels.Spec(), Geometry(3, 1, 8), 1)
    path = tmp_path / "f"
    artifact.save(path, made, header(["a", "b", "c"], 1))
    load = artifact.load

    def with_labels(path):
        loaded = load(path)
        loaded.header["label_numbers"] = 9
        return loaded

    monkeypatch.setattr(artifact, "load", with_labels)
    for form in ("png", "parquet", "npz"):
        assert main(["decode", str(path), "--out", str(tmp_path / form), "--format", form]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "learned labels are not in them" in said[0] and "soft_label" in said[1]
    assert pq.read_table(tmp_path / "parquet" / "train.parquet")["soft_label"].to_pylist()[1] == [0, 0.5, 0]
    assert np.load(tmp_path / "npz" / "distilled.npz")["labels"].tolist() == (np.eye(3) * 0.5).tolist()
