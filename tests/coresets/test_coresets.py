"""Coresets: each method against its definition in plain loops, what is stored, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tqdm import tqdm

import speedk
from speedk import data, networks, registry, training
from speedk.cli import main
from speedk.data.normaliser import ChannelNormaliser
from speedk.data.real import RealData, Subset, fingerprint
from speedk.distillation import coreset, coreset_network, coresets
from speedk.distillation.coresets.base import Members
from speedk.errors import ConfigError, TrainingError
from speedk.geometry import Geometry
from speedk.schedule import WHOLE
from speedk.workers import Pool

METHODS = registry.names(coresets)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coresets"


def make_real(count: int = 12, seed: int = 0) -> RealData:
    """Two classes of 8 x 8 images: bright on the left, bright on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2 * count) % 2
    images = torch.randint(0, 150, (len(labels), 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :, :3] += 60
    images[labels == 1, :, :, 5:] += 60
    part, names = Subset(images, labels), ("left", "right")
    return RealData("sides", Geometry(2, 1, 8), names, "made up", "", fingerprint(names, part, part),
                    ChannelNormaliser([0.4], [0.2]), part, part)


def members(count: int = 30, width: int = 5, seed: int = 0) -> Members:
    generator = torch.Generator().manual_seed(seed)
    return Members(count, torch.randn(count, width, generator=generator) ** 3,
                   torch.randint(4, (count,), generator=generator))


def pick(method: str, seen: Members, count: int, seed: int = 0) -> list[int]:
    return registry.find(coresets, method).choose(seen, count, torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("method", METHODS)
def test_none_is_chosen_twice_even_where_all_are_alike(method):
    for seen in (members(6), Members(6, torch.ones(6, 3), torch.zeros(6, dtype=torch.int64))):
        for count in (1, 4, 6):
            found = pick(method, seen, count)
            assert len(set(found)) == len(found) == count and set(found) <= set(range(6))


def test_herding_takes_what_brings_the_mean_closest():
    seen = members()
    features = [list(map(float, row)) for row in seen.features.double()]
    mean = [sum(column) / len(features) for column in zip(*features)]
    chosen: list[int] = []
    for _ in range(7):
        def error(candidate: int) -> float:
            rows = [features[i] for i in [*chosen, candidate]]
            return math.dist(mean, [sum(column) / len(rows) for column in zip(*rows)])

        chosen.append(min((i for i in range(30) if i not in chosen), key=error))
    assert pick("herding", seen, 7) == chosen


def test_k_center_takes_the_furthest():
    seen = members()
    points = seen.features.double().numpy()
    first = int(np.linalg.norm(points - points.mean(0), axis=1).argmin())
    chosen = [first]
    for _ in range(6):
        chosen.append(max(range(30), key=lambda i: min(math.dist(points[i], points[j]) for j in chosen)))
    assert pick("kcenter", seen, 7) == chosen


def test_k_center_is_within_twice_the_best():
    seen = members(12, 2)
    points = seen.features.double().numpy()

    def radius(centres) -> float:
        return max(min(math.dist(p, points[c]) for c in centres) for p in points)

    best = min(radius(some) for some in itertools.combinations(range(12), 3))
    assert radius(pick("kcenter", seen, 3)) <= 2 * best + 1e-9


def test_k_means_takes_one_of_each_cluster_the_largest_first():
    generator = torch.Generator().manual_seed(1)
    sizes, centres = (3, 9, 6), torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    features = torch.cat([centre + torch.randn(size, 2, generator=generator)
                          for size, centre in zip(sizes, centres, strict=True)])
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    found = pick("kmeans", Members(18, features), 3)
    assert groups[found].tolist() == [1, 2, 0]
    for place, group in zip(found, (1, 2, 0), strict=True):
        own = features[groups == group]
        distance = (own - own.mean(0)).norm(dim=1)
        assert torch.equal(features[place], own[distance.argmin()])


def test_forgetting_takes_the_most_forgotten_and_ties_by_chance():
    forgotten = torch.tensor([0, 5, 2, 9, 2, 2, 0, 2])
    seen = Members(8, None, forgotten)
    assert pick("forgetting", seen, 2) == [3, 1]
    thirds = {pick("forgetting", seen, 3, seed)[2] for seed in range(40)}
    assert thirds == {2, 4, 5, 7}


def test_random_draws_every_image_equally_often():
    seen, counts = Members(10), np.zeros(10)
    for seed in range(400):
        counts[pick("random", seen, 3, seed)] += 1
    assert abs(counts - 120).max() < 5 * math.sqrt(400 * 0.3 * 0.7)


def test_forgetting_events_are_counted_as_defined():
    generator = torch.Generator().manual_seed(0)
    answers = torch.rand(9, 20, generator=generator) < 0.5  # epoch, image
    answers[:, 4], answers[:, 5] = False, True
    events = coreset_network.Events(20)
    for row in answers:
        for index in torch.randperm(20, generator=generator).split(7):
            events.see(index, row[index])
    expected = []
    for image in range(20):
        story = answers[:, image].tolist()
        expected.append(sum(before and not after for before, after in itertools.pairwise(story)))
    assert events.forgotten().tolist() == expected and expected[4] == 0 and expected[5] == 0


def test_training_reports_its_answers():
    real = make_real()
    images = training.ImageSet.of(real.normalised("train"), real.train.labels)
    network = networks.fresh("mlp", real.geometry, 0, width=8)
    seen = {}
    with Pool(torch.device("cpu"), 2) as pool:
        pool.piece = 3 * 64
        training.epoch(network, images, torch.Generator().manual_seed(0), pool, lambda: None, batch=10, augment=False,
                       standardise=False, on_answers=lambda index, right: seen.update(zip(index.tolist(),
                                                                                          right.tolist())))
    expected = (network(images.batch(torch.arange(24))).argmax(1) == real.train.labels).tolist()
    assert [seen[i] for i in range(24)] == expected and 0 < sum(expected) < 24


def test_features_are_what_the_classifier_reads():
    real = make_real()
    network = networks.fresh("convnet", real.geometry, 0, width=4)
    rows = torch.tensor([5, 3, 20])
    with Pool(torch.device("cpu"), 1) as pool:
        found = coreset_network.Trained(network, torch.zeros(24)).features(real, rows, pool)
    expected = network.features(real.normalised("train", rows)).detach()
    torch.testing.assert_close(found, expected)
    assert found.requires_grad is False


@pytest.mark.parametrize("method", METHODS)
def test_a_coreset_is_real_images_of_each_class_and_reads_as_any_file(method, tmp_path):
    real = make_real()
    options = {"seed": 3, "network": "mlp", "epochs": 2}
    rows = coreset.choose(real, method, 4, threads=1, **options)
    assert torch.equal(rows, coreset.choose(real, method, 4, threads=3, **options))
    assert real.train.labels[rows].tolist() == [0] * 4 + [1] * 4 and len(set(rows.tolist())) == 8
    coreset.save(tmp_path / "a.safetensors", real, rows, method, **options)
    read = speedk.load(tmp_path / "a.safetensors")
    assert torch.equal(read.images(), real.normalised("train", rows)) and read.labels.tolist() == [0] * 4 + [1] * 4
    assert (read.method, read.header["objective"]["name"], read.ipc) == ("pixels", method, 4)
    assert read.header["numbers"] == read.header["budget"] == 8 * 64
    assert read.header["recipe"]["coreset"]["rows"] == rows.tolist()
    assert "nothing in it was learned" in read.header["chosen"]
    report = speedk.evaluate(read, real, networks=("mlp",), runs=1, protocol="quick", epochs=3, progress=False)
    assert report.details["objective"] == method


def test_the_network_is_trained_once(cache, monkeypatch):
    real, epochs, epoch = make_real(), [], training.epoch
    monkeypatch.setattr(training, "epoch", lambda *args, **options: epochs.append(1) or epoch(*args, **options))
    options = {"network": "mlp", "epochs": 3}
    first = coreset.choose(real, "herding", 2, **options)
    file, = cache.iterdir()
    assert torch.equal(first, coreset.choose(real, "herding", 2, **options)) and len(epochs) == 3
    coreset.choose(real, "forgetting", 1, **options)
    coreset.choose(real, "random", 1, **options)
    assert len(epochs) == 3
    file.write_bytes(file.read_bytes()[:-9])  # a damaged one is made again
    assert torch.equal(first, coreset.choose(real, "herding", 2, **options)) and len(epochs) == 6
    coreset.choose(real, "herding", 2, seed=1, **options)
    coreset.choose(make_real(seed=1), "herding", 2, **options)
    assert len(epochs) == 12 and len(list(cache.iterdir())) == 3
    monkeypatch.setattr(coreset_network, "WHOLE", dataclasses.replace(WHOLE, rate=1e30))
    with pytest.raises(TrainingError, match="mlp for the features did not train"):
        coreset.choose(real, "kcenter", 2, seed=5, **options)


def test_what_takes_long_shows_that_it_goes_on(capsys, monkeypatch):
    real, options = make_real(), {"network": "mlp", "epochs": 3}
    for place in (coreset, coreset_network):
        monkeypatch.setattr(place, "tqdm", lambda *args, delay=0, **options: tqdm(*args, mininterval=0, **options))
    coreset.choose(real, "herding", 2, **options, progress=True)
    said = capsys.readouterr().err
    assert "training the mlp: " in said and "3/3" in said and "choosing: " in said and "2/2" in said
    coreset.choose(real, "herding", 2, **options, progress=True)
    assert "training" not in capsys.readouterr().err  # it is in the cache
    coreset.choose(real, "kcenter", 2, **options, seed=1, progress=False)
    assert capsys.readouterr().err == ""


def test_the_network_learns():
    real = make_real(60)
    with Pool(torch.device("cpu"), 1) as pool:
        found = coreset_network.trained(real, "mlp", 12, 0, pool)
    logits = found.network(real.normalised("train"))
    assert (logits.argmax(1) == real.train.labels).float().mean() > 0.9
    assert found.forgotten.shape == (120,) and found.forgotten.min() >= 0 and found.forgotten.max() < 12


@pytest.mark.parametrize(("options", "said"), [
    ({"method": "hering"}, "did you mean 'herding'"), ({"ipc": 0}, "ipc=0"), ({"epochs": 0}, "epochs=0"),
    ({"ipc": 13}, "class 'left' has 12 training images, fewer than ipc=13"),
])
def test_what_cannot_be_chosen(options, said):
    with pytest.raises(ConfigError, match=said):
        coreset.choose(make_real(), **{"method": "random", "ipc": 1, **options})


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name=None, path=None, **options: make_real())
    monkeypatch.chdir(tmp_path)
    line = ["coreset", "--method", "herding", "--ipc", "2", "--network", "mlp", "--epochs", "2", "--device", "cpu"]
    assert main([*line, "--out", "here", "--evaluate"]) == 0
    out = capsys.readouterr().out
    assert "4 real images whose mean feature is close to their class's, 2 of each of 2 classes" in out
    assert "convnet" in out and (tmp_path / "here" / "evaluation.json").exists()
    assert (tmp_path / "here" / "preview.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["info", "here/distilled.safetensors"]) == 0
    assert "name herding" in capsys.readouterr().out
    assert main(line) == 0
    assert (tmp_path / "runs" / "sides-ipc2-herding-seed0" / "distilled.safetensors").exists()
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "recipe.toml").touch()  # of one that has made no file yet
    for words, said in (([*line, "--out", "here"], "already holds a distilled file"),
                        ([*line, "--out", "a run"], "or a run that makes one"),
                        (["coreset", "--method", "kcentre"], "did you mean 'kcenter'"),
                        ([*line, "--network", "mpl"], "did you mean 'mlp'"), ([*line, "--ipc", "0"], "--ipc 0"),
                        ([*line, "--ipc", "13", "--out", "none"], "fewer than ipc=13")):
        assert main(words) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
