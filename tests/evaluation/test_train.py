"""Training: the update rule against plain loops, and what a run depends on."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedk import networks, training, workers
from speedk.errors import ConfigError
from speedk.evaluation import train
from speedk.geometry import Geometry
from speedk.schedule import PROTOCOLS, WHOLE, Schedule, schedule
from speedk.training import ImageSet
from speedk.workers import Pool

GEOMETRY = Geometry(3, 1, 8)
CPU = torch.device("cpu")


def make_set(count: int = 20, soft: bool = False, dtype: torch.dtype = torch.float32) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype)
    labels = torch.randint(3, (count,), generator=generator)
    if soft:
        labels = torch.softmax(torch.randn(count, 3, generator=generator, dtype=dtype), 1)
    return ImageSet.of(images, labels)


def fit(plan: Schedule, data: ImageSet, seeds=(0, 1), names=("mlp", "convnet"), threads: int = 1, **options):
    with Pool(CPU, threads) as pool:
        return train.train_all(names, dict.fromkeys(seeds, data), GEOMETRY, plan, pool, **options)


def weights(run: train.Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.network.parameters()])


@pytest.mark.parametrize("soft", [False, True])
def test_the_update_is_sgd_with_a_drop_and_a_fresh_momentum(soft):
    plan = Schedule(epochs=5, rate=0.1, batch=8, augment=False)
    data = make_set(soft=soft, dtype=torch.float64)
    network = networks.fresh("mlp", GEOMETRY, 0, width=4).double()
    expected = [p.detach().clone() for p in network.parameters()]
    reference = copy.deepcopy(network)
    with Pool(CPU, 1) as pool:
        training.train(network, data, plan, torch.Generator().manual_seed(7), pool)

    images, order = data.batch(torch.arange(20)), torch.Generator().manual_seed(7)
    for epoch in range(5):
        if epoch in (0, 3):  # half of the epochs, and one more
            rate, velocity = (0.1 if epoch == 0 else 0.01), [torch.zeros_like(p) for p in expected]
        permutation = torch.randperm(20, generator=order)
        for start in (0, 8, 16):
            index = permutation[start:start + 8]
            with torch.no_grad():
                for p, value in zip(reference.parameters(), expected, strict=True):
                    p.copy_(value)
            logits = reference(images[index]).log_softmax(1)
            target = data.labels[index] if soft else F.one_hot(data.labels[index], 3)
            loss = -(target * logits).sum() / len(index)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            for i, gradient in enumerate(gradients):
                velocity[i] = 0.9 * velocity[i] + gradient + 5e-4 * expected[i]
                expected[i] = expected[i] - rate * velocity[i]
    for p, value in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-10, atol=1e-12)


def test_a_run_depends_on_its_seed_alone(monkeypatch):
    monkeypatch.setattr(workers, "POOL_PIECE_PIXELS", 5 * 64)
    plan, data = Schedule(epochs=3, batch=16), make_set()
    torch.manual_seed(1)
    runs = fit(plan, data)
    torch.manual_seed(2)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = fit(plan, data, seeds=(1,), names=("convnet", "mlp"), threads=3)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    by_key = {(run.network_name, run.seed): run for run in runs}
    assert len(by_key) == 4
    for run in again:
        assert torch.equal(weights(run), weights(by_key[run.network_name, 1]))
        assert run.loss == by_key[run.network_name, 1].loss
        assert not torch.equal(weights(run), weights(by_key[run.network_name, 0]))


class Noisy(nn.Module):
    """A network that draws from the global random state."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(geometry.pixels, geometry.classes), nn.Dropout(0.5)

    def forward(self, images):
        return self.linear(self.dropout(images.flatten(1)))


def test_dropout_is_seeded_too(monkeypatch):
    monkeypatch.setattr(train.networks, "fresh", lambda name, geometry, seed, device: Noisy(geometry).to(device))
    monkeypatch.setattr(workers, "POOL_PIECE_PIXELS", 5 * 64)
    torch.manual_seed(0)
    first = fit(Schedule(epochs=2, batch=16), make_set(), names=("noisy",))
    torch.manual_seed(0)
    second = fit(Schedule(epochs=2, batch=16), make_set(), names=("noisy",))
    assert torch.equal(weights(first[0]), weights(second[0])) and torch.equal(weights(first[1]), weights(second[1]))


def test_a_run_that_diverges_says_so_and_the_others_go_on():
    epochs = []
    good, bad = make_set(), make_set()
    bad.batch(torch.arange(20))
    broken = ImageSet.of(torch.full((20, 1, 8, 8), float("nan")), bad.labels)
    with Pool(CPU, 2) as pool:
        runs = train.train_all(("mlp",), {0: good, 1: broken}, GEOMETRY, Schedule(epochs=4), pool,
                               lambda: epochs.append(1))
    assert runs[0].failure is None and runs[0].loss > 0
    assert runs[1].failure == "training was not finite in epoch 1 of 4 at a rate of 0.01"
    assert len(epochs) == 8


def test_an_interrupt_stops_every_run():
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Schedule(epochs=10**9), make_set(), threads=2, on_epoch=interrupt)


def test_the_protocols():
    paper, quick = PROTOCOLS["paper"], PROTOCOLS["quick"]
    assert (paper.epochs, paper.drop, quick.epochs, quick.drop, WHOLE.epochs) == (1001, 501, 200, 101, 50)
    assert {(s.batch, s.momentum, s.weight_decay, s.augment) for s in (paper, quick, WHOLE)} == {(256, 0.9, 5e-4, True)}
    chosen = schedule("quick", "speed", rate=0.5)
    assert chosen == dataclasses.replace(quick, standardise=True, rate=0.5)
    assert schedule("paper", precision="bf16") == dataclasses.replace(paper, precision="bf16")
    for wrong in ({"protocol": "quik"}, {"protocol": "quick", "standardisation": "sped"},
                  {"protocol": "quick", "rate": 0.0}, {"protocol": "quick", "epochs": 0},
                  {"protocol": "quick", "precision": "fp8"}):
        with pytest.raises(ConfigError):
            schedule(**wrong)
