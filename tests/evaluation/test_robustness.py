"""Accuracy on corrupted images: what is tested on, what is said, folders as CIFAR-10-C is published, the picture."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import io
import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import make_real

import speedk
from speedk import corruptions, data, training
from speedk.cli import evaluate as command
from speedk.errors import ConfigError, DataError
from speedk.evaluation import plots, robustness
from speedk.workers import Pool

SHORT = {"networks": ("mlp",), "runs": 2, "device": "cpu", "protocol": "quick", "epochs": 20, "progress": False}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a small file on corrupted images that are made."""
    from speedk.distillation import coreset

    real, path = make_real(), tmp_path_factory.mktemp("made") / "distilled.safetensors"
    coreset.save(path, real, coreset.choose(real, "random", 2), "random")
    return speedk.evaluate(path, real, corruptions=True, **SHORT)


def write_folder(folder, real, severities: int = 5):
    """A folder like CIFAR-10-C: each corruption is a constant image, whose value tells corruption and severity."""
    folder.mkdir()
    count = 7
    labels = np.arange(count) % 3
    np.save(folder / "labels.npy", np.tile(labels, severities))
    for i, name in enumerate(corruptions.NAMES):
        values = np.repeat(10 * i + np.arange(severities), count).astype(np.uint8)
        side = real.geometry.resolution
        np.save(folder / f"{name}.npy", np.broadcast_to(values[:, None, None, None], (len(values), side, side, 3)))
    return folder


def test_every_variant_is_tested_once_by_its_own_images():
    real = make_real()
    expected = {(name, severity): corruptions.corrupt(real.test.images, name, severity)
                for name in corruptions.NAMES for severity in corruptions.SEVERITIES}
    seen = []
    for name, severity, images in robustness.made(real).sets(real):
        index = torch.arange(len(images))
        assert torch.equal(images.batch(index), real.normaliser.normalise(expected[name, severity]))
        assert torch.equal(images.labels, real.test.labels)
        seen.append((name, severity))
    assert seen == list(expected) and len(seen) == robustness.VARIANTS == 75


def test_the_accuracies_are_those_of_the_variants():
    real = make_real()

    class Brightest(torch.nn.Module):
        """Right about whatever has its brightest columns where its class has them."""

        def forward(self, images):
            return torch.stack([images[:, :, :, 3 * i:3 * i + 2].mean((1, 2, 3)) for i in range(3)], 1)

    network = Brightest()
    with Pool(torch.device("cpu"), 1) as pool:
        found = robustness.measure([network, network], robustness.made(real), real, pool, batch=16, standardise=False)
        for name, severity in (("gaussian_noise", 2), ("fog", 5)):
            images = real.normaliser.normalise(corruptions.corrupt(real.test.images, name, severity))
            expected = 100 * float((network(images).argmax(1) == real.test.labels).double().mean())
            assert found[name][severity - 1] == pytest.approx([expected, expected])
        data = training.ImageSet.of(real.normalised("test"), real.test.labels)
        assert training.accuracies([network], data, pool, batch=16) == [1.0]


def test_the_report_gives_all_and_their_mean(report):
    found, = report.robustness
    assert list(found.accuracies) == list(corruptions.NAMES)
    every = [[run for run in severity] for severities in found.accuracies.values() for severity in severities]
    assert len(every) == 75 and all(len(runs) == 2 for runs in every)
    means = [statistics.fmean(runs[i] for runs in every) for i in range(2)]
    assert found.mean == pytest.approx(statistics.fmean(means)) and found.std == pytest.approx(statistics.pstdev(means))
    assert found.of("snow") == pytest.approx(statistics.fmean(a for runs in found.accuracies["snow"] for a in runs))
    assert found.clean == report.results[0].accuracies
    assert min(map(found.of, found.accuracies)) < found.mean < statistics.fmean(found.clean)
    assert found.severity("snow", 5) == statistics.fmean(found.accuracies["snow"][4])
    stored = json.loads(report.to_json())["corruptions"]
    assert stored["results"][0]["mean"] == found.mean and "frost is procedural" in stored["source"]
    lines = [line.split() for line in str(report).splitlines()]
    assert ["mean", "of", "all", "15", f"{found.mean:.2f}", "+-", f"{found.std:.2f}"] in lines
    assert ["zoom_blur", f"{found.of('zoom_blur'):.2f}"] in lines


def test_equal_files_meet_equal_corruptions(report):
    again = speedk.evaluate(report.source, make_real(), corruptions=True, threads=3, **{**SHORT, "runs": 1})
    assert all(runs[0] == a[0] for name, severities in report.robustness[0].accuracies.items()
               for runs, a in zip(severities, again.robustness[0].accuracies[name], strict=True))


def test_without_corruptions_nothing_is_said(real, write_artifact):
    report = speedk.evaluate(write_artifact(real), real, **{**SHORT, "epochs": 1})
    assert "corruptions" not in report.to_dict() and "corrupted" not in str(report)


def test_a_run_that_failed_has_no_mean(real, write_artifact):
    report = speedk.evaluate(write_artifact(real), real, corruptions=True, rate=1e30, **SHORT)
    assert report.failed and report.robustness[0].mean is None and report.robustness[0].of("fog") is None
    assert json.loads(report.to_json())["corruptions"]["results"][0]["mean"] is None


def test_a_folder_is_read_by_severity(real, tmp_path):
    variants = robustness.read(write_folder(tmp_path / "c", real), real)
    for name, severity, images in variants.sets(real):
        value = 10 * corruptions.NAMES.index(name) + severity - 1
        wanted = torch.full((7, 3, 8, 8), value, dtype=torch.uint8)
        assert torch.equal(images.batch(torch.arange(7)), real.normaliser.normalise(wanted))
        assert images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert str(tmp_path) in variants.source


def test_folders_that_do_not_fit_are_one_line_before_anything_is_trained(real, tmp_path, write_artifact, monkeypatch):
    path = write_artifact(real)
    monkeypatch.setattr(training, "epoch", None)

    few = np.zeros((5, 8, 8, 3), np.uint8)

    def refused(said: str, change, name: str):
        folder = write_folder(tmp_path / name, real)
        change(folder)
        with pytest.raises(DataError, match=said) as caught:
            speedk.evaluate(path, real, corruptions=folder, **SHORT)
        assert "\n" not in str(caught.value)

    refused("fog.npy is missing", lambda f: (f / "fog.npy").unlink(), "a")
    refused("snow.npy is damaged", lambda f: (f / "snow.npy").write_bytes(b"\x93NUMPY"), "b")
    refused(r"frost.npy holds uint8 \[5, 8, 8, 3\]", lambda f: np.save(f / "frost.npy", few), "c")
    refused("labels from 0 to 3", lambda f: np.save(f / "labels.npy", np.arange(35) % 4), "d")
    refused(r"labels.npy holds float64 \[35\]", lambda f: np.save(f / "labels.npy", np.zeros(35)), "e")
    refused(r"labels.npy holds int64 \[34\]", lambda f: np.save(f / "labels.npy", np.zeros(34, int)), "f")
    refused("damaged", lambda f: np.save(f / "fog.npy", np.array([{}]), allow_pickle=True), "g")
    with pytest.raises(DataError, match="is not a folder of corrupted images"):
        speedk.evaluate(path, real, corruptions=tmp_path / "none", **SHORT)


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_the_polar_picture_has_a_panel_a_network():
    pytest.importorskip("matplotlib")
    curve = {name: 20.0 + i for i, name in enumerate(corruptions.NAMES)}
    one = plots.polar({"convnet": {"ours": curve}})
    two = plots.polar({"convnet": {"ours": curve, "theirs": {k: v / 2 for k, v in curve.items()}},
                       "mlp": {"ours": curve}})
    assert size(two)[0] > 1.5 * size(one)[0] and size(one)[0] > 400
    assert plots.polar({"convnet": {"ours": curve}}) == one
    assert plots.polar({"convnet": {"ours": {**curve, "fog": 1.0}}}) != one


@pytest.mark.parametrize("kind", ["polar", "curves"])
def test_a_name_has_one_colour_in_all_panels_and_in_the_legend(kind, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, png = [], plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or png(figure))
    curve = {"fog": 20.0, "snow": 30.0, "frost": 25.0} if kind == "polar" else [(1, 50.0, 1.0), (2, 40.0, 2.0)]
    panels = {"convnet": {"b": curve}, "mlp": {"a": curve, "b": curve, "c": curve}, "vit": {"c": curve, "a": curve}}
    getattr(plots, kind)(panels, *([] if kind == "polar" else ["classes", "accuracy"]))
    figure, = drawn
    legend = {text.get_text(): line.get_color()
              for line, text in zip(figure.legends[0].get_lines(), figure.legends[0].get_texts(), strict=True)}
    assert sorted(legend) == ["a", "b", "c"] and len(set(legend.values())) == 3
    for axes, names in zip(figure.axes, panels.values(), strict=True):
        assert {line.get_label(): line.get_color() for line in axes.get_lines()} == {n: legend[n] for n in names}


def test_long_names_are_not_cut(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, png = [], plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or png(figure))
    names = [f"cifar10-ipc1-{method}-dm-precision=bf16-steps=400-seed0" for method in ("pixels", "speed", "haba")]
    plots.polar({"convnet": {name: {"fog": 20.0, "snow": 30.0, "frost": 25.0} for name in names}})
    legend = drawn[0].legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= drawn[0].bbox.width


@pytest.fixture
def run(real, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name=None, path=None, **options: real)

    def call(line: str) -> int:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.run(parser.parse_args(line.split()))

    return call


LINE = "--dataset stripes --networks mlp --runs 1 --protocol quick --epochs 2 --device cpu"


def test_the_command_draws_what_it_measured(run, real, write_artifact, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path, drawn = write_artifact(real), []
    polar = plots.polar
    monkeypatch.setattr(plots, "polar", lambda panels: drawn.append(panels) or polar(panels))
    assert run(f"{path} {LINE} --corruptions") == 0
    first = path.with_name("evaluation.json")
    mean = json.loads(first.read_text())["corruptions"]["results"][0]["corruptions"]["fog"]["mean"]
    assert drawn[0]["mlp"][tmp_path.name]["fog"] == mean
    earlier = first.rename(tmp_path / "first.json")
    assert run(f"{path} {LINE} --seed 1 --corruptions --compare {earlier}") == 0
    assert list(drawn[1]["mlp"]) == [f"1: {tmp_path.name}", f"2: {tmp_path.name}"]
    assert path.with_name("corruptions.1.png").exists() and path.with_name("corruptions.png").exists()
    assert "the earlier picture is now" in capsys.readouterr().out
    assert run(f"{path} {LINE} --corruptions --out {tmp_path / 'named.json'}") == 0
    assert (tmp_path / "named.png").exists() and not path.with_name("corruptions.2.png").exists()


def test_without_matplotlib_the_numbers_are_there_and_the_mend_is_said(run, real, write_artifact, capsys, monkeypatch):
    actual = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return actual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    path = write_artifact(real)
    assert run(f"{path} {LINE} --corruptions") == 0
    assert 'no picture is drawn without matplotlib: pip install "speedk[plots]"' in capsys.readouterr().out
    assert path.with_name("evaluation.json").exists() and not path.with_name("corruptions.png").exists()


def test_wrong_command_lines(run, tmp_path):
    for words, kind, said in ((f"--whole {LINE} --compare a.json", ConfigError, "--compare draws curves"),
                              (f"--whole {LINE} --corruptions none", ConfigError, "put FILE before it"),
                              (f"--whole {LINE} --corruptions --compare a.json", DataError, "cannot read a.json")):
        with pytest.raises(kind, match=said):
            run(words)
    for content in ("{}", "[", '{"source": 3, "corruptions": []}', "[1]"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match="is not a report"):
            run(f"--whole {LINE} --corruptions --compare {tmp_path / 'a.json'}")


def test_greys_are_corrupted_too():
    real = make_real()
    grey = dataclasses.replace(real, geometry=dataclasses.replace(real.geometry, channels=1),
                               test=data.Subset(real.test.images[:, :1], real.test.labels),
                               normaliser=data.ChannelNormaliser([0.3], [0.2]))
    shapes = {tuple(images.batch(torch.arange(2)).shape) for _, _, images in robustness.made(grey).sets(grey)}
    assert shapes == {(2, 1, 8, 8)}
