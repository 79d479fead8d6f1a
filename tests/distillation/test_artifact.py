"""The distilled file: what goes in comes out, bit for bit, and equal content is equal bytes."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from artifacts import HEADER, METHODS, make

import speedk
from speedk.distillation import artifact, tensorfile
from speedk.distillation.parameterizations import speed
from speedk.errors import ArtifactError, TrainingError
from speedk.geometry import Geometry


@pytest.fixture(params=METHODS)
def saved(request, tmp_path):
    made, header = make(request.param)
    path = tmp_path / "distilled.safetensors"
    artifact.save(path, made, header)
    return made, header, path


def refused(path):
    with pytest.raises(ArtifactError) as caught:
        speedk.load(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    return line


def test_images_and_labels_come_back_bit_for_bit(saved):
    made, header, path = saved
    images, labels = made.decode(torch.arange(made.size))
    loaded = speedk.load(path)
    assert torch.equal(loaded.images(), images.detach()) and loaded.images().dtype == torch.float32
    assert torch.equal(loaded.labels, labels.detach()) and torch.equal(loaded.classes, made.classes)
    assert not loaded.images().requires_grad and not loaded.labels.requires_grad
    assert (loaded.method, loaded.geometry, loaded.ipc) == (made.name, made.geometry, made.ipc)
    assert loaded.class_names == header["class_names"] and len(loaded) == made.size
    assert loaded.synthetic.spec == made.spec
    for key, value in header.items():
        assert loaded.header[key] == value


def test_loading_draws_no_random_numbers(saved):
    _, _, path = saved
    before = torch.get_rng_state()
    speedk.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_index_decodes_those_images(saved):
    made, _, path = saved
    loaded = speedk.load(path)
    index = torch.tensor([4, 0, 4])
    assert torch.allclose(loaded.images(index=index), loaded.images()[index], atol=1e-6)
    assert loaded.images(index=torch.tensor([], dtype=torch.int64)).shape == (0, *loaded.images().shape[1:])
    for wrong in ([-1], [made.size], [[0]], [0.5], [True]):
        with pytest.raises(ValueError, match="index must be"):
            loaded.images(index=torch.tensor(wrong))
    with pytest.raises(ValueError, match="space='rgb'"):
        loaded.images("rgb")


def test_decoding_in_chunks_is_decoding(saved, monkeypatch):
    _, _, path = saved
    loaded = speedk.load(path)
    whole, unit, labels = loaded.images(), loaded.images("unit"), loaded.labels
    assert float(unit.min()) >= 0 and float(unit.max()) <= 1 and not torch.equal(unit, whole)
    monkeypatch.setattr(artifact, "_CHUNK", 1)
    assert torch.allclose(loaded.images(), whole, atol=1e-6) and torch.allclose(loaded.images("unit"), unit, atol=1e-6)
    assert torch.equal(loaded.labels, labels)


def test_pictures_undo_the_normaliser(tmp_path):
    made, header = make("pixels")
    artifact.save(tmp_path / "a", made, header)
    unit = speedk.load(tmp_path / "a").images("unit")
    mean, std = (torch.tensor(header["normaliser"][key])[:, None, None] for key in ("mean", "std"))
    assert torch.allclose(unit, (made.images.detach() * std + mean).clamp(0, 1), atol=1e-6)


def test_a_dataset_feeds_a_loader(saved):
    _, _, path = saved
    loaded = speedk.load(path)
    images, labels = zip(*torch.utils.data.DataLoader(loaded.dataset(), batch_size=4), strict=True)
    assert torch.equal(torch.cat(images), loaded.images()) and torch.equal(torch.cat(labels), loaded.labels)


def test_the_count_is_the_bytes(saved):
    made, _, path = saved
    loaded = speedk.load(path)
    raw = path.read_bytes()
    (header_size,) = struct.unpack("<Q", raw[:8])
    rows = loaded.storage()
    assert sum(size for _, _, size in rows) == len(raw) - 8 - header_size
    assert all(numbers == size / 4 for _, numbers, size in rows)
    header = loaded.header
    assert header["numbers"] + header["label_numbers"] == sum(numbers for _, numbers, _ in rows)
    if made.name != "tiny":
        assert header["numbers"] == sum(made.planned_storage(made.spec, made.geometry, made.ipc).values())
        assert header["label_numbers"] == 0
    else:
        assert header["label_numbers"] == 6 * 3 and ("labels", 18, 72) in rows


def test_published_row_counts_as_published():
    """CIFAR-10 at IPC 1: 29,872 of 30,720 numbers, 119,488 bytes of tensors."""
    geometry = Geometry(10, 3, 32)
    made = speed.Speed(speed.Spec(images_per_class=17, D=32, K=16, H=2, R=1, k=48, patch=4), geometry, 1)
    made.finalize()
    data = artifact.dump(made, {**HEADER, "class_names": list("abcdefghij"), "budget_off": False})
    header, tensors = tensorfile.unpack(data)
    assert (header["numbers"], header["budget"]) == (29_872, 30_720)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 119_488


def test_equal_content_is_equal_bytes(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from artifacts import make\n"
        "from speedk.distillation import artifact\n"
        "made, header = make('speed')\n"
        "artifact.save(sys.argv[2], made, dict(reversed(header.items())))\n"
    )
    made, header = make("speed")
    expected = artifact.dump(made, header)
    assert artifact.dump(made, header) == expected
    for seed in ("1", "2"):  # other orders of sets and other insertion orders of the header
        path = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script, os.path.dirname(__file__), str(path)]
        subprocess.run(command, check=True, env=environment)
        assert path.read_bytes() == expected
    assert artifact.dump(*make("speed", seed=1)) != expected


def test_a_loaded_set_saves_to_the_same_bytes(saved):
    _, header, path = saved
    loaded = speedk.load(path)
    assert artifact.dump(loaded.synthetic, header) == path.read_bytes()


def test_any_reader_of_safetensors_opens_it(saved):
    made, _, path = saved
    theirs = safetensors.torch.load_file(path)
    ours = made.storage()
    assert theirs.keys() == ours.keys()
    assert all(t.dtype == ours[name].dtype and torch.equal(t, ours[name]) for name, t in theirs.items())
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["speedk"])["method"] == made.name
        metadata = file.metadata()
    path.write_bytes(safetensors.torch.save(theirs, metadata))  # written again by that library, it is still ours
    assert torch.equal(speedk.load(path).images(), made.decode(torch.arange(made.size))[0].detach())


def test_wide_indices_take_two_bytes():
    made, header = make("speed16")
    _, tensors = tensorfile.unpack(artifact.dump(made, header))
    assert tensors["scm.rows"].dtype == tensors["scm.cols"].dtype == torch.uint16


def test_nothing_of_the_machine_is_in_it(saved):
    _, _, path = saved
    raw = path.read_bytes()
    for word in (os.path.dirname(path), os.uname().nodename, os.environ.get("USER", "root")):
        assert word.encode() not in raw


def test_a_set_that_cannot_be_read_back_is_not_written(tmp_path):
    made, header = make("speed")
    path = tmp_path / "a"
    for change, word in (({"class_names": ["a", "a", "b"]}, "one name"), ({"class_names": ["a", "b"]}, "2 class names"),
                         ({"budget_off": False}, "over its budget"), ({"seed": "1"}, "seed"),
                         ({"objective": {"name": "dm", "lr": float("nan")}}, "JSON")):
        with pytest.raises(ArtifactError, match=word):
            artifact.save(path, made, {**header, **change})
    header.pop("chosen")
    with pytest.raises(ArtifactError, match="chosen"):
        artifact.save(path, made, header)
    with torch.no_grad():
        made.saet[0, 0] = float("inf")
    with pytest.raises(ArtifactError, match="finite"):
        artifact.save(path, made, HEADER)
    assert not path.exists()
    with pytest.raises(TrainingError, match="create the folder"):
        artifact.save(tmp_path / "none" / "a", *make("speed"))


def test_values_that_decode_to_infinity_are_refused(tmp_path):
    made, header = make("speed")
    with torch.no_grad():
        made.freenet.output.weight.fill_(3e38)
    artifact.save(tmp_path / "a", made, header)
    with pytest.raises(ArtifactError, match="not finite"):
        speedk.load(tmp_path / "a").images()


def test_too_large_to_decode_at_once(saved, monkeypatch):
    _, _, path = saved
    monkeypatch.setattr(artifact, "MAX_DECODED", 1000)
    with pytest.raises(ArtifactError, match="over the limit of 1,000 at once"):
        speedk.load(path).images()
    assert len(speedk.load(path).images(index=torch.tensor([0]))) == 1


def zipped(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 100)
    return stream.getvalue()


def saved_by(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


OTHERS = {
    "pickle": (pickle.dumps(Bomb()), "a Python pickle"),
    "old pickle": (pickle.dumps(Bomb(), protocol=2), "a Python pickle"),
    "checkpoint": (saved_by(lambda f: torch.save({"a": torch.ones(3)}, f)), "a PyTorch checkpoint"),
    "old checkpoint": (saved_by(lambda f: torch.save([1], f, _use_new_zipfile_serialization=False)), "pickle"),
    "npz": (saved_by(lambda f: np.savez(f, images=np.ones(3))), "a NumPy archive"),
    "npy": (saved_by(lambda f: np.save(f, np.ones(3))), "a NumPy array"),
    "zip": (zipped("a.txt"), "a zip archive"),
    "parquet": (b"PAR1" + bytes(100), "a parquet file"),
    "png": (b"\x89PNG\r\n" + bytes(100), "a PNG picture"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "json": (b'{"images": []}', "a JSON file"),
    "text": (b"distilled images, honestly" * 4, "not a file that speedk wrote"),
    "zeros": (bytes(4096), "not a file that speedk wrote"),
    "empty": (b"", "is empty"),
    "short": (b"\x10\0\0", "is cut off"),
    "safetensors": (safetensors.torch.save({"a": torch.ones(3)}), "not one that speedk wrote"),
    "other metadata": (safetensors.torch.save({"a": torch.ones(3)}, {"format": "pt"}), "not one that speedk wrote"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(name, tmp_path):
    data, words = OTHERS[name]
    (tmp_path / "file").write_bytes(data)
    assert words in refused(tmp_path / "file")


def test_paths_that_are_no_files(tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "is a folder and holds no distilled.safetensors" in refused(tmp_path)
    (tmp_path / "distilled.safetensors").write_bytes(b"")
    assert "is a folder: did you mean" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert "cannot read" in refused("a\0b")
    assert "cannot read" in refused("n" * 300)


def test_another_format_says_what_to_do(saved):
    made, header, path = saved
    for number, words in ((2, "upgrade speedk"), (0, "write it again")):
        document, tensors = tensorfile.unpack(artifact.dump(made, header))
        document["format"] = number  # also where the checksum is another's: a newer one may count otherwise
        path.write_bytes(tensorfile.pack(document, tensors))
        assert f"was written by format {number}, this speedk reads 1: {words}" in refused(path)


def test_an_unknown_method_is_named(saved):
    made, header, path = saved
    document, tensors = tensorfile.unpack(artifact.dump(made, header))
    document["method"] = "spede"
    document["checksum"] = artifact.checksum(document, tensors)
    path.write_bytes(tensorfile.pack(document, tensors))
    assert "did you mean 'speed'?" in refused(path)
