"""Evaluation: sources, what must agree between a file and the data, the report."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import math
import statistics
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stripes import make_real

import speedk
from speedk import data
from speedk.data.normaliser import ChannelNormaliser
from speedk.errors import ArtifactError, ConfigError, DataError
from speedk.evaluation import continual, real_images, sources, whole
from speedk.evaluation.evaluate import device_name, device_of

QUICK = {"networks": ("mlp",), "runs": 2, "device": "cpu", "protocol": "quick", "epochs": 4, "progress": False}


def evaluate(source, real, **options):
    return speedk.evaluate(source, real, **{**QUICK, **options})


def test_a_distilled_file_is_evaluated_from_its_bytes(real, write_artifact, tmp_path):
    path = write_artifact(real)
    report = evaluate(path, real, out=tmp_path / "evaluation.json", epochs=30)
    result, = report.results
    assert result.mean > 60  # a third by chance
    assert result.mean == statistics.fmean(result.accuracies)
    assert result.std == statistics.pstdev(result.accuracies)
    assert all(abs(a * 90 / 100 - round(a * 90 / 100)) < 1e-4 for a in result.accuracies)  # of 90 test images
    assert report.protocol["rate"] == 0.02 and report.images == 6
    assert report.storage == {"images": 6 * 192}
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored == json.loads(report.to_json())
    assert stored["results"][0]["accuracies"] == result.accuracies
    assert stored["data"]["fingerprint"] == real.fingerprint


def test_same_seed_same_numbers(real, write_artifact):
    path = write_artifact(real)
    first = evaluate(path, real, runs=3, networks=("mlp", "convnet"), threads=1)
    second = evaluate(speedk.load(path), real, runs=2, networks=("convnet", "mlp"), seed=1, threads=4)
    by_name = {r.network: r for r in second.results}
    for r in first.results:
        assert r.seeds == [0, 1, 2] and by_name[r.network].seeds == [1, 2]
        assert r.accuracies[1:] == by_name[r.network].accuracies


def test_the_report_says_what_it_must(real, write_artifact):
    noted = dataclasses.replace(real, note="stripes are not images")
    text = str(evaluate(write_artifact(real), noted))
    for part in ("stripes, split made up, 90 test images, stripes are not images", "1,152 float32 numbers, 4,608 bytes",
                 "quick (changed): 4 epochs, batch 256, SGD at 0.02", "after epoch 3", "seeds 0 1", "6 images",
                 "mtt: no per-batch standardisation"):
        assert part in text, text
    assert "standardised by its own statistics" in str(evaluate(write_artifact(real, protocol="speed"), real))


def test_standardisation_comes_from_the_file_and_can_be_named(real, write_artifact):
    path = write_artifact(real, protocol="speed")
    assert evaluate(path, real).protocol["standardisation"] == "speed"
    assert evaluate(path, real, standardisation="mtt").protocol["standardisation"] == "mtt"
    assert evaluate(real_images(real), real).protocol["standardisation"] == "mtt"


def test_other_data_than_distilled_from_are_refused(real, write_artifact):
    path = write_artifact(real)
    other = make_real(seed=5)
    with pytest.raises(DataError, match=r"distilled from stripes .* give the same data"):
        evaluate(path, other)
    assert evaluate(path, other, other_data=True).data["fingerprint"] == other.fingerprint
    with pytest.raises(DataError, match="normaliser kind=channel mean=.* load them as they were"):
        evaluate(path, make_real(normaliser=ChannelNormaliser([0.5] * 3, [0.5] * 3)))
    smaller = dataclasses.replace(real, geometry=speedk.geometry.Geometry(3, 3, 4))
    with pytest.raises(DataError, match="3 classes of 3x8x8, but stripes has 3 classes of 3x4x4"):
        evaluate(path, smaller, other_data=True)


def test_other_data_are_normalised_as_the_file_is(real, write_artifact):
    artifact = speedk.load(write_artifact(real))
    other = make_real(seed=5, normaliser=ChannelNormaliser([0.5] * 3, [0.5] * 3))
    _, tested_on = sources.distilled(artifact, other, other_data=True)
    assert tested_on.normaliser.describe() == real.normaliser.describe()
    expected = real.normaliser.normalise(other.test.images[:3])
    assert torch.equal(tested_on.normalised("test", torch.arange(3)), expected)


def test_a_failed_run_is_plain(real, write_artifact, tmp_path):
    report = evaluate(write_artifact(real), real, rate=1e30, out=tmp_path / "out.json")
    result, = report.results
    assert report.failed and result.mean is None and result.std is None and result.accuracies == [None, None]
    assert "mlp, seed 0: training was not finite in epoch" in str(report)
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["mean"] is None


def test_the_runs_of_a_file_share_one_copy_of_it_on_a_device(real, write_artifact):
    source, _ = sources.distilled(speedk.load(write_artifact(real)), real)
    given = sources.arrays("x.npz", torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), real)
    for one in (source, given):
        first, second = (one.images(seed, real, torch.device("meta")) for seed in (0, 1))  # a copy, unlike on the CPU
        assert first.labels.is_meta and first.labels is second.labels
        assert first.fetch.__self__.is_meta and first.fetch.__self__ is second.fetch.__self__
        assert not one.images(0, real, torch.device("cpu")).labels.is_meta


def test_real_images_are_drawn_anew_for_each_run(real):
    source = real_images(real, 2)
    first, second = (source.images(seed, real, torch.device("cpu")) for seed in (0, 1))
    assert first.labels.tolist() == [0, 0, 1, 1, 2, 2]
    index = torch.arange(6)
    again = source.images(0, real, torch.device("cpu")).batch(index)
    assert torch.equal(first.batch(index), again) and not torch.equal(again, second.batch(index))
    train_images = real.normalised("train")
    for image, label in zip(again, first.labels, strict=True):
        matches = (train_images == image).flatten(1).all(1)
        assert matches.any() and set(real.train.labels[matches].tolist()) == {int(label)}
    assert sum(source.storage.values()) == real.geometry.budget(2)
    with pytest.raises(ConfigError, match="the smallest class has 20"):
        real_images(real, 21)


def test_the_whole_data_set_is_the_upper_bound(real):
    report = evaluate(whole(real), real, epochs=None)
    assert report.protocol["name"] == "whole" and report.protocol["epochs"] == 50 and report.images == 60
    assert report.accuracy() > 90


def test_digits_in_their_order():
    digits = data.load("digits", progress=False)
    some, more, everything = (
        evaluate(source, digits, epochs=epochs).accuracy()
        for source, epochs in ((real_images(digits), 60), (real_images(digits, 10), 60), (whole(digits), 20)))
    assert 20 < some < more < everything and everything > 70


def write_npz(path, real, **change):
    arrays = {"images": real.train.images[:6].numpy(), "labels": real.train.labels[:6].numpy(), **change}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_archives_of_other_code(real, tmp_path):
    images = real.train.images[:6]
    expected = evaluate(write_npz(tmp_path / "a.npz", real), real).results[0].accuracies
    unit = (images.float() / 255).numpy()
    last = images.permute(0, 2, 3, 1).numpy()
    normalised = real.normaliser.normalise(images).numpy()
    hot = np.eye(3, dtype=np.float32)[real.train.labels[:6].numpy()]
    for change in ({"images": last}, {"images": unit.astype(np.float64)}, {"labels": hot},
                   {"images": normalised, "space": "normalised", "class_names": np.array(real.class_names)}):
        assert evaluate(write_npz(tmp_path / "b.npz", real, **change), real).results[0].accuracies == expected


@pytest.mark.parametrize(("change", "message"), [
    ({"images": None}, "no array 'images'"),
    ({"images": np.zeros((6, 3, 9, 9), np.uint8)}, r"shape \[6, 3, 9, 9\]"),
    ({"images": np.zeros((0, 3, 8, 8), np.uint8), "labels": np.zeros(0, np.int64)}, r"shape \[0, 3, 8, 8\]"),
    ({"images": np.full((6, 3, 8, 8), 2.0)}, "values from 2 to 2"),
    ({"images": np.full((6, 3, 8, 8), np.nan)}, "not finite"),
    ({"images": np.zeros((6, 3, 8, 8), np.int64)}, "images of int64"),
    ({"images": np.array([["a"]])}, "of type <U1"),
    ({"labels": np.array([0, 1, 2, 0, 1, 3])}, "from 0 to 3"),
    ({"labels": np.array([0, 1, 2])}, r"shape \[3\] for 6 images"),
    ({"labels": np.full((6, 2), 0.5)}, "not 6 rows of 3 probabilities"),
    ({"space": "zca"}, "space='zca'"),
    ({"class_names": np.array(["right", "middle", "left"])}, "labels would not mean the same"),
])
def test_archives_that_do_not_fit_are_one_line(real, tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        evaluate(write_npz(tmp_path / "a.npz", real, **change), real)
    assert "\n" not in str(caught.value)


def test_damaged_archives_are_one_line(real, tmp_path):
    good = write_npz(tmp_path / "good.npz", real).read_bytes()
    path = tmp_path / "bad.npz"
    random = np.random.default_rng(0)
    accepted = 0
    for trial in range(150):
        data = bytearray(good)
        if trial % 3 == 0:
            data = data[:random.integers(len(data))]
        else:
            for place in random.integers(len(data), size=4):
                data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            evaluate(path, real, epochs=1, runs=1)
            accepted += 1  # a flip in a field of the archive that nothing reads
        except (ArtifactError, DataError) as error:
            assert "\n" not in str(error)
    assert accepted < 30
    with pytest.raises(ArtifactError, match="Python objects|allow_pickle"):
        evaluate(write_npz(path, real, images=np.array([{"a": 1}], dtype=object)), real)
    with pytest.raises(DataError, match="does not exist"):
        evaluate(tmp_path / "none.npz", real)


def test_an_archive_that_announces_more_than_it_has_takes_no_memory(real, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 3, 8, 8)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    with pytest.raises(ArtifactError, match="more than it has"):
        evaluate(tmp_path / "a.npz", real)


def write_parquet(path, real, images=None, labels=None, **columns):
    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    if images is None:
        images = [png(image) for image in real.train.images[:6]]
    pq.write_table(pa.table({"image": images, "label": labels or real.train.labels[:6].tolist(), **columns}), path)
    return path


def test_parquet_of_other_code(real, tmp_path):
    expected = evaluate(write_npz(tmp_path / "a.npz", real), real).results[0].accuracies
    assert evaluate(write_parquet(tmp_path / "a.parquet", real), real).results[0].accuracies == expected
    hot = np.eye(3)[real.train.labels[:6].numpy()].tolist()
    assert evaluate(write_parquet(tmp_path / "a.parquet", real, soft_label=hot), real).results[0].accuracies == expected


def test_parquet_that_is_damaged_or_does_not_fit(real, tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(ArtifactError, match="image in row 0"):
        evaluate(write_parquet(path, real, images=[{"bytes": b"no image", "path": None}] * 6), real)
    with pytest.raises(DataError, match="from 0 to 7"):
        evaluate(write_parquet(path, real, labels=[0, 1, 2, 7, 0, 0]), real)
    path.write_bytes(write_parquet(path, real).read_bytes()[:-20])
    with pytest.raises(ArtifactError, match="damaged, or not a parquet file"):
        evaluate(path, real)


def test_options_that_do_not_exist(real):
    for wrong, message in (({"networks": ("convnt",)}, "did you mean 'convnet'"), ({"runs": 0}, "runs=0"),
                           ({"protocol": "long"}, "'long'"), ({"rate": math.inf}, "rate of inf")):
        with pytest.raises(ConfigError, match=message):
            evaluate(real_images(real), real, **wrong)


def test_a_gpu_is_named_as_torch_names_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name(torch.device("cuda", 1)) == "card 1" and device_name(torch.device("cpu")) == "CPU"


@pytest.mark.parametrize("gpu", [True, False])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for function in (speedk.evaluate, speedk.distill, continual):
        said = inspect.signature(function).parameters["device"].default
        assert said == "auto" and device_of(said).type == ("cuda" if gpu else "cpu")
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")
