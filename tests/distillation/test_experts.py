"""Experts: plain SGD, the same bits however they came about, and folders that hold one kind."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import DEVICES, make_real

import speedk
from speedk import networks, seeds
from speedk.data.normaliser import ChannelNormaliser
from speedk.distillation import experts
from speedk.distillation.experts.folder import ExpertFolder, Identity
from speedk.distillation.objectives import tm
from speedk.errors import ArtifactError, ConfigError, TrainingError


@pytest.fixture(scope="module")
def real():
    return make_real(resolution=8, count=8)


def make(path, real, count=2, epochs=3, threads=1, progress=lambda *_: None, device="cpu", **fields):
    identity = Identity.of(real, **{"network": "mlp", "rate": 0.1, "batch": 10, **fields})
    folder = ExpertFolder.create(path, identity)
    experts.train(folder, real, count, epochs, device, threads=threads, progress=progress)
    return folder


def contents(folder, count=2):
    return [folder.file(number).read_bytes() for number in range(count)]


@pytest.mark.parametrize("device", DEVICES)
def test_an_expert_is_plain_sgd(real, tmp_path, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = make(tmp_path, real, count=2, device=device, augment=False, network="convnet")
    assert folder.numbers() == [0, 1]
    seed = seeds.derive(0, "expert", 1)
    network = networks.fresh("convnet", real.geometry, seeds.derive(seed, "start")).double()
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(folder.snapshot(1, 0).double(), flat, rtol=0, atol=0)
    images = real.normalised("train").double()
    for epoch in range(3):
        total = 0.0
        for index in torch.randperm(24, generator=seeds.generator(seed, "epoch", epoch)).split(10):
            loss = F.cross_entropy(network(images[index]), real.train.labels[index])
            total += float(loss.detach()) * len(index)
            for p, gradient in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters()))):
                p.data -= 0.1 * gradient
        flat = torch.cat([p.detach().flatten() for p in network.parameters()])
        torch.testing.assert_close(folder.snapshot(1, epoch + 1).double(), flat, rtol=1e-4, atol=1e-5)
        assert folder.record(1).losses[epoch] == pytest.approx(total / 24, rel=1e-4)
    said = network(real.normalised("test").double()).argmax(1)
    assert folder.record(1).accuracies[-1] == pytest.approx(float((said == real.test.labels).double().mean()))
    assert not torch.equal(folder.snapshot(0, 0), folder.snapshot(1, 0))


@pytest.mark.parametrize("network,precision", [("convnet", "float32"), ("mlp", "bf16"), ("vit", "float32")])
def test_however_it_came_about_an_expert_has_the_same_bits(real, tmp_path, network, precision, monkeypatch):
    if network == "vit":  # dropout; small, as its own sizes are of no interest here
        build, sizes = networks.build, {"dim": 16, "depth": 1, "heads": 1, "hidden": 8}
        monkeypatch.setattr(networks, "build", lambda name, geometry: build(name, geometry, **sizes))
    fields = {"network": network, "precision": precision}
    whole = contents(make(tmp_path / "whole", real, **fields))
    torch.manual_seed(4)
    assert contents(make(tmp_path / "again", real, **fields)) == whole
    if network != "vit":  # dropout needs a batch in one piece, which torch's own threads do
        assert contents(make(tmp_path / "threads", real, threads=3, **fields)) == whole

    def interrupt(done, *_):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "broken", real, progress=interrupt, **fields)
    torch.manual_seed(5)
    assert contents(make(tmp_path / "broken", real, **fields)) == whole
    make(tmp_path / "longer", real, count=1, epochs=1, **fields)
    make(tmp_path / "longer", real, count=1, epochs=2, **fields)
    longer = make(tmp_path / "longer", real, **fields)
    assert contents(longer) == whole
    assert make(tmp_path / "longer", real, epochs=1, **fields).record(0).epochs == 3  # nothing is cut back


def of_ones_own(monkeypatch, *layers, prepare=lambda network: None):
    """Make every network a small ConvNet with `layers` after its convolution."""

    def build(name, geometry):
        network = nn.Sequential(nn.Conv2d(geometry.channels, 4, 3), *copy.deepcopy(layers), nn.Flatten(),
                                nn.Linear(4 * (geometry.resolution - 2)**2, geometry.classes))
        prepare(network)
        return network

    monkeypatch.setattr(networks, "build", build)


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.RReLU()], ids=lambda m: str(m))
def test_every_kind_of_chance_is_seeded(real, tmp_path, monkeypatch, layer):
    of_ones_own(monkeypatch, layer)
    whole = contents(make(tmp_path / "whole", real, epochs=2))
    torch.manual_seed(4)
    make(tmp_path / "longer", real, epochs=1)
    assert contents(make(tmp_path / "longer", real, epochs=2)) == whole


def test_what_is_frozen_keeps_its_value(real, tmp_path, monkeypatch):
    of_ones_own(monkeypatch, prepare=lambda network: network[0].requires_grad_(False))
    folder = make(tmp_path / "whole", real, epochs=2)
    network = networks.build("mlp", real.geometry)
    frozen = sum(p.numel() for p in network[0].parameters())
    rows = folder.rows(0)
    assert torch.equal(rows[0, :frozen], rows[2, :frozen]) and not torch.equal(rows[0, frozen:], rows[2, frozen:])
    make(tmp_path / "longer", real, epochs=1)
    assert contents(make(tmp_path / "longer", real, epochs=2)) == contents(folder)
    # Unrolled from the same start, a student keeps the same parameters.
    images, lr = real.normalised("train"), torch.tensor(0.1)
    theta = speedk.unroll(network, rows[0], images, real.train.labels, [[0, 1]], lr)
    assert torch.equal(theta[:frozen], rows[0, :frozen]) and not torch.equal(theta[frozen:], rows[0, frozen:])
    of_ones_own(monkeypatch, prepare=lambda network: network.requires_grad_(False))
    with pytest.raises(ConfigError, match="network mlp has no parameters to train"):
        make(tmp_path / "never", real)


def test_only_buffers_that_are_no_constants_are_refused(real, tmp_path, monkeypatch):
    def prepare(network):
        network.register_buffer("k", torch.tensor([2.0, float("nan")]))

    of_ones_own(monkeypatch, prepare=prepare)
    whole = contents(make(tmp_path / "whole", real, epochs=2))
    make(tmp_path / "longer", real, epochs=1)
    assert contents(make(tmp_path / "longer", real, epochs=2)) == whole
    of_ones_own(monkeypatch, nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"mlp cannot be an expert: its 1.running_mean changes in training"):
        make(tmp_path / "never", real)
    of_ones_own(monkeypatch, prepare=lambda network: network.register_buffer("k", torch.randn(3)))
    with pytest.raises(ConfigError, match=r"mlp cannot be an expert: its k is drawn at random, and not kept"):
        make(tmp_path / "never", real)
    state = torch.get_rng_state()
    of_ones_own(monkeypatch, nn.Dropout(), nn.BatchNorm2d(4, track_running_stats=False), prepare=prepare)
    assert Identity.of(real).parameters == 4 * 28 + 8 + 144 * 3 + 3
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_interrupted_keeps_its_finished_epochs(real, tmp_path):
    def interrupt(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, real, count=1, progress=interrupt)
    folder = ExpertFolder.open(tmp_path)
    assert folder.epochs(0) == 2 and experts.missing(folder, 2, 3) == 4
    told = []
    make(tmp_path, real, count=2, progress=lambda *seen: told.append(seen))
    assert [(done, total) for done, total, _ in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(told[0][2]) == {"loss", "accuracy"}


def test_bf16_halves_the_rows_and_rounds_them(real, tmp_path):
    exact, rounded = make(tmp_path / "a", real), make(tmp_path / "b", real, precision="bf16")
    assert torch.equal(rounded.snapshot(1, 2), exact.snapshot(1, 2).bfloat16().float())
    assert rounded.rows(1).dtype == torch.bfloat16 and rounded.snapshot(1, 2).dtype == torch.float32


def test_two_at_once_share_the_work(real, tmp_path):
    ticks, lock = [], threading.Lock()

    def tick(*_):
        with lock:
            ticks.append(1)

    others = [threading.Thread(target=make, args=(tmp_path / "run", real, 4), kwargs={"progress": tick})
              for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(ticks) == 4 * 3
    assert contents(ExpertFolder.open(tmp_path / "run"), 4) == contents(make(tmp_path / "alone", real, count=4), 4)


def test_a_dead_process_gives_up_its_claim(real, tmp_path):
    folder = make(tmp_path, real, count=1, epochs=1)
    script = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
              "print('held', flush=True); time.sleep(60)")
    with folder.claim(7) as mine:
        assert mine
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / ".expert-0007.lock"], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with folder.claim(7) as mine:
            assert not mine
    finally:
        process.kill()
        process.wait()
    left = tmp_path / ".expert-0007.safetensors.0123abcd.partial"
    left.write_bytes(b"half")
    with folder.claim(7) as mine:
        assert mine and not left.exists()


@pytest.mark.parametrize("change,said", [
    ({"network": "convnet"}, "network=mlp, not convnet"),
    ({"rate": 0.2}, "rate=0.1, not 0.2"),
    ({"precision": "bf16"}, "precision=float32, not bf16"),
    ({"standardise": True}, "standardise=False, not True"),
])
def test_another_identity_is_refused(real, tmp_path, change, said):
    make(tmp_path, real, count=1, epochs=1)
    with pytest.raises(ConfigError, match=f"holds experts with {said}: choose another folder"):
        make(tmp_path, real, **change)


def test_other_data_are_refused(real, tmp_path):
    folder = make(tmp_path, real, count=1, epochs=1)
    other = make_real(resolution=8, count=8, seed=1)
    with pytest.raises(ConfigError, match=r"data=[0-9a-f]{12}\.\.\., not"):
        experts.train(folder, other, 1, 2)
    with pytest.raises(ConfigError, match=r"data=[0-9a-f]{12}\.\.\., not .*: they are for stripes"):  # not the rate
        make(tmp_path, other, network="convnet", rate=0.2)
    with pytest.raises(ConfigError, match="network=mlp, not convnet"):
        make(tmp_path, real, network="convnet", rate=0.2)
    whiter = dataclasses.replace(real, normaliser=ChannelNormaliser((0.1,) * 3, (0.25,) * 3))
    with pytest.raises(ConfigError, match=r"normaliser=\{kind: channel, mean: \[0.5, .* not .*0\.1"):
        experts.check_data(folder, whiter)
    with pytest.raises(ConfigError, match="resolution=8, not 16"):
        experts.check_data(folder, make_real())
    renamed = dataclasses.replace(real, name="moved")
    assert make(tmp_path, renamed, count=1, epochs=1).numbers() == [0]


def test_a_network_that_changed_since_is_refused(real, tmp_path, monkeypatch):
    folder = make(tmp_path, real, count=1, epochs=1)
    build = networks.build
    monkeypatch.setattr(networks, "build", lambda name, geometry: build(name, geometry, width=7))
    with pytest.raises(ConfigError, match=r"holds experts of [\d,]+ parameters, but mlp has [\d,]+: choose another"):
        experts.train(folder, real, 1, 2)


def test_a_folder_of_something_else_is_left_alone(real, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds thesis.tex but no experts.json"):
        make(tmp_path, real)
    with pytest.raises(ConfigError, match="is no folder of experts"):
        ExpertFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "bit", "swapped", "gone", "header", "pickle"])
def test_a_damaged_file_is_one_line(real, tmp_path, damage):
    folder = make(tmp_path, real, epochs=2)
    path = folder.file(0)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "bit":
        path.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif damage == "swapped":
        path.write_bytes(folder.file(1).read_bytes())
    elif damage == "gone":
        path.unlink()
    elif damage == "header":
        path.write_bytes(data.replace(b'losses', b'lasses'))
    else:
        path.write_bytes(b"\x80\x04junk" * 40)
    with pytest.raises(ArtifactError, match=r"expert-0000.safetensors is (damaged .*: delete it|missing)") as caught:
        folder.snapshot(0, 2)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_damaged_row_is_not_carried_into_a_longer_file(real, tmp_path, precision):
    folder = make(tmp_path, real, count=1, epochs=2, precision=precision)
    first = folder.rows(0)[0].contiguous().view(torch.uint8).numpy().tobytes()
    data = folder.file(0).read_bytes()
    place = data.index(first)
    damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]
    folder.file(0).write_bytes(damaged)
    with pytest.raises(ArtifactError, match="0000.safetensors is damaged .*epoch 0 are not .*: delete it") as caught:
        make(tmp_path, real, count=1, epochs=3, precision=precision)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert folder.file(0).read_bytes() == damaged


def test_a_damaged_folder_is_one_line(real, tmp_path):
    make(tmp_path, real, count=1, epochs=1)
    for text in ('{"format": 1}', "{", '{"format": 2, "identity": {}}', '{"format": 1, "identity": {"rate": 1}}'):
        (tmp_path / "experts.json").write_text(text)
        with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / "experts.json"))):
            ExpertFolder.open(tmp_path)


def test_an_expert_that_diverges_says_so(real, tmp_path):
    with pytest.raises(TrainingError, match="is not finite after 1 epoch at a rate of 1e\\+30: lower it"):
        make(tmp_path, real, count=1, rate=1e30)
    assert ExpertFolder.open(tmp_path).epochs(0) == -1


class Slow(ChannelNormaliser):
    def normalise(self, images):
        time.sleep(2e-3 * len(images))
        return super().normalise(images)


@pytest.mark.parametrize("count", [1, 2])
def test_the_estimate_knows_all_that_an_epoch_does(real, monkeypatch, tmp_path, count):
    """Images that take far longer to read than to train on, and the test after each epoch."""
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path))
    slow = dataclasses.replace(real, normaliser=Slow((0.5,) * 3, (0.25,) * 3))
    spec = tm.Spec(network="mlp", max_start=2, expert_count=count)
    _, seconds = tm.TrajectoryMatching(spec, slow, 0, torch.device("cpu")).preparation()
    least = 3 * count * 2e-3 * (len(real.train) + len(real.test)) / min(count, torch.get_num_threads())
    assert least < seconds < 3 * least
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(real, tmp_path):
    for wrong in ({"rate": 0.0}, {"batch": 0}, {"precision": "int8"}, {"network": "convnot"}):
        with pytest.raises(ConfigError):
            Identity.of(real, **wrong)
    folder = make(tmp_path, real, count=1, epochs=1)
    with pytest.raises(ConfigError, match=r"has 1 epoch, not 2: extend it"):
        folder.snapshot(0, 2)
    with pytest.raises(ConfigError, match="nothing to train"):
        experts.train(folder, real, 0, 1)


def test_the_cache_is_keyed_by_all_that_matters(real, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDK_CACHE", str(tmp_path))
    changes = [{}, {"rate": 0.2}, {"batch": 11}, {"augment": False}, {"standardise": True}, {"seed": 1},
               {"precision": "bf16"}, {"network": "mlp"}]
    found = [experts.place(Identity.of(real, **change)) for change in changes]
    found.append(experts.place(Identity.of(make_real(resolution=8, count=8, seed=1))))
    assert len(set(found)) == len(found) and all(path.is_relative_to(tmp_path / "experts") for path in found)
    assert experts.place(Identity.of(real)) == found[0]
