"""Learning step by step: which classes a step sees, what it is tested on, folders with a file a step, the command."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import statistics

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from speedk import data, training
from speedk.cli import main
from speedk.data.normaliser import ChannelNormaliser
from speedk.data.real import RealData, Subset, fingerprint
from speedk.distillation import artifact, coreset
from speedk.distillation.parameterizations.pixels import Pixels, Spec
from speedk.errors import ConfigError, DataError
from speedk.evaluation import continual, evaluate, plots, real_images, stepfiles
from speedk.geometry import Geometry

module = importlib.import_module("speedk.evaluation.continual")  # the package gives its function the same name
NAMES = tuple("abcdef")
SHORT = {"networks": ("mlp",), "runs": 2, "device": "cpu", "protocol": "quick", "epochs": 15, "steps": 3,
         "progress": False}


def make_real(seed: int = 0, names=NAMES) -> RealData:
    """Six classes of 8 x 8 images: a bright row, at a place that is the class."""
    generator = torch.Generator().manual_seed(seed)

    def part(count: int) -> Subset:
        labels = torch.arange(len(names) * count) % len(names)
        images = torch.randint(0, 90, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8)
        for i, name in enumerate(names):
            images[labels == i, :, NAMES.index(name)] += 160
        return Subset(images, labels)

    train, test = part(6), part(10)
    return RealData("rows", Geometry(len(names), 1, 8), names, "made up", "", fingerprint(names, train, test),
                    ChannelNormaliser([0.3], [0.25]), train, test)


def header(real: RealData, names) -> dict:
    return {"recipe": {}, "class_names": list(names), "normaliser": real.normaliser.describe(), "data": real.describe(),
            "seed": 0, "protocol": "mtt", "objective": {"name": "dm", "lr": 0.02}, "chosen": "", "budget_off": False}


def write(path, real: RealData, classes: str, normaliser: ChannelNormaliser | None = None, lr: float = 0.02):
    """A file with one real image of each of the `classes`."""
    rows = torch.tensor([int((real.train.labels == NAMES.index(name)).nonzero()[0, 0]) for name in classes])
    own = normaliser or real.normaliser
    images = own.normalise(real.train.images[rows])
    made = Pixels(Spec(), Geometry(len(classes), 1, real.geometry.resolution), 1, images=images)
    said = header(dataclasses.replace(real, normaliser=own), classes)
    artifact.save(path, made, {**said, "objective": {"name": "dm", "lr": lr}})
    return path


@pytest.fixture
def file(tmp_path):
    real = make_real()
    coreset.save(tmp_path / "distilled.safetensors", real, coreset.choose(real, "random", 2), "random")
    return tmp_path / "distilled.safetensors"


def test_a_split_is_a_partition_that_its_seed_gives():
    parts = module.split(11, 4, 7)
    assert sorted(label for part in parts for label in part) == list(range(11))
    assert sorted(map(len, parts)) == [2, 3, 3, 3] and parts == module.split(11, 4, 7) != module.split(11, 4, 8)


def test_a_part_is_numbered_in_the_order_of_its_classes():
    images = torch.arange(8.0)[:, None, None, None]
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    part = module.part(training.ImageSet.of(images, labels), [3, 1], 4)
    assert part.labels.tolist() == [1, 0, 1, 0]
    assert part.batch(torch.arange(4)).flatten().tolist() == [1, 3, 5, 7]
    assert part.batch(torch.tensor([3, 0])).flatten().tolist() == [7, 1]
    soft = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.0, 0.6]])
    part = module.part(training.ImageSet.of(images[:3], soft), [3, 1], 4)
    assert part.batch(torch.arange(2)).flatten().tolist() == [0, 2]
    torch.testing.assert_close(part.labels, torch.tensor([[0.375, 0.625], [0.75, 0.25]]))


def test_each_step_learns_and_is_tested_on_all_classes_so_far(file, monkeypatch):
    real, learned, tested = make_real(), [], []
    train_all, accuracies = module.train.train_all, training.accuracies

    def watch(names, sets, geometry, *rest):
        learned.append((geometry.classes, {seed: part.batch(torch.arange(len(part))) for seed, part in sets.items()}))
        return train_all(names, sets, geometry, *rest)

    def test(nets, part, *rest, **options):
        tested.append((part.batch(torch.arange(len(part))), part.labels))
        return accuracies(nets, part, *rest, **options)

    monkeypatch.setattr(module.train, "train_all", watch)
    monkeypatch.setattr(training, "accuracies", test)
    report = continual([file], real, **SHORT)
    assert report.classes == [2, 4, 6] and [count for count, _ in learned] == [2, 4, 6]
    assert [len(part) for part, _ in tested] == [20, 20, 40, 40, 60, 60]
    memory, whole = artifact.load(file), real.normalised("test")
    for step, (_, sets) in enumerate(learned):
        for seed, images in sets.items():
            seen = [label for part in module.split(6, 3, seed)[:step + 1] for label in part]
            expected = memory.images()[torch.isin(memory.classes, torch.tensor(seen))]
            assert torch.equal(images, expected)
            rows = torch.isin(real.test.labels, torch.tensor(seen))
            part, labels = tested[2 * step + seed]
            assert torch.equal(part, whole[rows])
            assert torch.tensor(seen)[labels].tolist() == real.test.labels[rows].tolist()
    curve, = report.curves
    assert len(curve.accuracies) == 3 and all(len(runs) == 2 for runs in curve.accuracies)
    assert curve.mean(2) == statistics.fmean(curve.accuracies[2]) > 40  # a sixth by chance
    assert curve.mean(0) > 70


def test_the_seed_decides_and_files_share_their_splits(file, tmp_path):
    real = make_real()
    second = write(tmp_path / "other.safetensors", real, "abcdef")
    report = continual([file, second], real, threads=1, **SHORT)
    again = continual([file], real, threads=3, **{**SHORT, "runs": 1, "seed": 1})
    assert [run[1] for run in report.curves[0].accuracies] == [run[0] for run in again.curves[0].accuracies]
    assert [curve.source for curve in report.curves] == [str(file), str(second)]
    assert report.memories[1]["schedule"].startswith("15 epochs, batch 256, SGD at 0.02")
    stored = json.loads(report.to_json())
    assert stored["curves"][0]["means"][2] == report.curves[0].mean(2) and stored["seeds"] == [0, 1]
    assert "anew for each run" in stored["memories"][0]["split"]


def test_a_folder_has_a_file_for_each_step(tmp_path, monkeypatch):
    real = make_real()
    folder = tmp_path / "steps"
    folder.mkdir()
    other = ChannelNormaliser([0.5], [0.5])
    for name, classes in (("step-10", "ba"), ("step-2", "fc"), ("step-1", "ed")):
        write(folder / f"{name}.safetensors", real, classes, other if name == "step-2" else None)
    source, parts = stepfiles.read(folder, real)
    assert parts == [[4, 3], [5, 2], [1, 0]]
    images = source.images(0, real, torch.device("cpu"))
    assert images.labels.tolist() == [4, 3, 5, 2, 1, 0] and source.rate == 0.02 and source.storage == {"images": 384}
    rows = [int((real.train.labels == label).nonzero()[0, 0]) for label in images.labels.tolist()]
    torch.testing.assert_close(images.batch(torch.arange(6)), real.normalised("train", torch.tensor(rows)))
    report = continual([folder], real, **{**SHORT, "steps": None})
    assert report.classes == [2, 4, 6] and report.memories[0]["split"] == "a file for each step"


def test_the_files_of_a_strict_run_are_distilled_from_their_own_classes(tmp_path, monkeypatch, capsys):
    real = make_real()
    monkeypatch.setattr(data, "load", lambda name=None, path=None, **options: real)

    def distil(out, *words):
        return main(["distill", "--data", "rows", "--method", "pixels", "--network", "mlp", "--objective", "dm",
                     "--out", str(tmp_path / "steps" / out), "--steps", "1", "--device", "cpu", "batch=4", *words])

    for out, classes in (("step-1", "e,d"), ("step-2", "5,c"), ("step-10", "0-1")):
        assert distil(out, f"classes={classes}") == 0
    page = capsys.readouterr().out
    assert "2 of its 6 classes" in page and "128 of 128 float32 numbers" in page  # the budget is that of two classes
    first = tmp_path / "steps/step-1/distilled.safetensors"
    loaded = artifact.load(first)
    own = real.only(["e", "d"])
    assert loaded.class_names == ["e", "d"] == loaded.header["data"]["classes"] and loaded.geometry.classes == 2
    assert loaded.header["recipe"]["data"]["classes"] == "e,d" and loaded.header["budget"] == 128
    assert loaded.header["data"]["fingerprint"] == own.fingerprint != real.fingerprint
    assert loaded.header["normaliser"] == real.normaliser.describe()
    found = evaluate(first, real, networks=("mlp",), runs=1, protocol="quick", epochs=1, progress=False)
    assert found.data["test"] == 20 and found.data["classes"] == ["e", "d"]
    assert distil("step-1", "classes=e,d", "--resume") == 0 == main(
        ["distill", "--data", "rows", "--out", str(first.parent), "--resume", "--device", "cpu"])
    assert distil("step-1", "classes=d,e", "--resume") == 1
    report = continual([tmp_path / "steps"], real, **{**SHORT, "steps": None})
    assert stepfiles.read(tmp_path / "steps", real)[1] == [[4, 3], [5, 2], [0, 1]]
    assert report.classes == [2, 4, 6] and report.memories[0]["split"] == "a file for each step"
    capsys.readouterr()
    for classes, said in (("a,x", "has no class 'x'"), ("a", "two or more"), ("a,0", "none of them twice")):
        assert distil("never", f"classes={classes}") == 1
        assert said in capsys.readouterr().err


def test_files_of_different_rates_are_trained_on_at_the_one_that_is_said(tmp_path):
    real = make_real()
    for classes, lr in (("abc", 0.1), ("def", 0.2)):  # as trajectory matching learns them
        write(tmp_path / f"{classes}.safetensors", real, classes, lr=lr)
    report = continual([tmp_path], real, **{**SHORT, "steps": None, "rate": 0.03, "epochs": 1})
    assert "SGD at 0.03" in report.memories[0]["schedule"]
    with pytest.raises(DataError, match=r"different rates \(0.1, 0.2\) or protocols \(mtt\): say one for all"):
        continual([tmp_path], real, **{**SHORT, "steps": None, "standardisation": "mtt"})


def test_folders_that_do_not_fit(tmp_path):
    real, number = make_real(), iter(range(9))

    def refused(said: str, *files, error=DataError, **options):
        folder = tmp_path / str(next(number))
        folder.mkdir()
        for i, (classes, lr) in enumerate(files):
            write(folder / f"{i}.safetensors", make_real(names=tuple(NAMES)), classes, lr=lr)
        with pytest.raises(error, match=said):
            continual([folder], options.pop("real", real), **{**SHORT, "steps": None, **options})

    refused("holds no distilled files")
    refused("an earlier file holds too", ("abc", 0.1), ("cdef", 0.1))
    refused("no file of .* holds the class 'f'", ("abc", 0.1), ("de", 0.1))
    few = make_real(names=("a", "b", "c"))
    refused("the class 'd', which rows does not have", ("abc", 0.1), ("def", 0.1), real=few)
    refused("made for different rates", ("abc", 0.1), ("def", 0.2))
    refused("2 and 3 steps", ("abc", 0.1), ("def", 0.1), error=ConfigError, steps=3)
    with pytest.raises(ConfigError, match="6 classes cannot be learned in 4 steps"):
        continual([real_images(real)], real, **{**SHORT, "steps": 4})
    with pytest.raises(ConfigError, match="nothing to run"):
        continual([], real, **SHORT)
    with pytest.raises(ConfigError, match="did you mean 'mlp'"):
        continual([real_images(real)], real, **{**SHORT, "networks": ("mpl",)})


def test_testing_shows_that_it_goes_on(file, capsys, monkeypatch):
    monkeypatch.setattr(module, "tqdm", lambda *args, delay=0, **options: tqdm(*args, mininterval=0, **options))
    continual([file], make_real(), **{**SHORT, "epochs": 1, "progress": True})
    said = capsys.readouterr().err
    assert said.count("testing:   0%|") == 3 and "testing: 100%|" in said and "learning step by step: 100%|" in said


def test_a_step_that_failed_has_no_mean(file):
    report = continual([file], make_real(), **{**SHORT, "rate": 1e30})
    assert report.failed and report.curves[0].mean(0) is None
    assert report.curves[0].failures[0].startswith("step 1, seed 0: training was not finite")


def test_the_picture_has_a_panel_a_network():
    pytest.importorskip("matplotlib")
    points = [(20, 50.0, 1.0), (40, 40.0, 2.0)]
    one = plots.curves({"convnet": {"ours": points}}, "classes", "accuracy")
    two = plots.curves({"convnet": {"ours": points, "theirs": points}, "mlp": {"ours": points}}, "classes", "accuracy")
    sizes = [Image.open(io.BytesIO(png)).size for png in (one, two)]
    assert sizes[1][0] > 1.5 * sizes[0][0] > 600
    assert plots.curves({"convnet": {"ours": [(20, 50.0, 1.0), (40, 41.0, 2.0)]}}, "classes", "accuracy") != one


def test_the_command(file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(data, "load", lambda name=None, path=None, **options: make_real())
    line = ["continual", str(file), "--dataset", "rows", "--steps", "3", "--networks", "mlp", "--runs", "1",
            "--protocol", "quick", "--epochs", "2", "--device", "cpu"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert re.search("memory +network +2 classes +4 classes +6 classes", out) and "seeds 0" in out
    stored = json.loads((tmp_path / "continual.json").read_text())
    assert stored["classes"] == [2, 4, 6]
    assert (tmp_path / "continual.png").read_bytes()[:4] == b"\x89PNG"
    assert main(line) == 0
    assert main(["continual", str(file.parent), *line[2:]]) == 0  # the run directory that it is in
    assert json.loads((tmp_path / "continual.json").read_text())["memories"] == stored["memories"]
    assert (tmp_path / "continual.1.json").exists() and (tmp_path / "continual.1.png").exists()
    failing = [*line, "--rate", "1e30", "--out", str(tmp_path / "c.json")]
    (tmp_path / "steps").mkdir()
    for words, said in ((failing, "3 networks did not train"), ([*line, "--runs", "0"], "--runs 0"),
                        ([*line, "--networks", "mpl"], "'mlp'"), ([*line, "--out", "no/a.json"], "no is not a folder"),
                        (["continual", str(tmp_path / "steps")], "does not say what to test on")):
        capsys.readouterr()
        assert main(words) == 1
        assert said in capsys.readouterr().err
