"""A batch cut into pieces, standardised batches, and the count of right answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedk import networks, training, workers
from speedk.geometry import Geometry
from speedk.training import ImageSet
from speedk.workers import Pool

GEOMETRY = Geometry(3, 1, 8)
CPU = torch.device("cpu")


def make_set(dtype: torch.dtype = torch.float32) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 1, 8, 8, generator=generator, dtype=dtype)
    return ImageSet.of(images, torch.randint(3, (20,), generator=generator))


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_pieces_of_a_batch_sum_to_the_batch(name, monkeypatch):
    data = make_set(torch.float64)
    network = networks.fresh(name, GEOMETRY, 0).double()
    images = data.batch(torch.arange(20))
    loss = F.cross_entropy(network(images), data.labels, reduction="sum")
    expected = torch.autograd.grad(loss, list(network.parameters()))
    monkeypatch.setattr(workers, "POOL_PIECE_PIXELS", 3 * 64)
    with Pool(CPU, 2) as pool:
        pieces = training.in_pieces(pool, training.gradients, network, images, data.labels)
    assert len(pieces) == 7
    torch.testing.assert_close(sum(part for part, _ in pieces), loss.detach())
    for i, gradient in enumerate(expected):
        torch.testing.assert_close(sum(gradients[i] for _, gradients in pieces), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["convnet", "mlp", "vit"])
def test_bf16_rounds_the_products_and_nothing_else(name):
    data, network = make_set(), networks.fresh(name, GEOMETRY, 0).eval()  # no dropout
    images = data.batch(torch.arange(20))
    exact, rounded = (training.gradients(network, images, data.labels, precision=p) for p in ("float32", "bf16"))
    assert {t.dtype for t in (rounded[0], *rounded[1], *network.parameters())} == {torch.float32}
    ours, theirs = (torch.cat([g.flatten().double() for g in gradients]) for _, gradients in (rounded, exact))
    assert not torch.equal(ours, theirs)
    assert float(F.cosine_similarity(ours, theirs, dim=0)) > 0.99 and 0.9 < float(ours.norm() / theirs.norm()) < 1.1


@pytest.mark.parametrize("module", [
    nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(),
    nn.RReLU(), nn.MultiheadAttention(4, 1, dropout=0.1), nn.LSTM(4, 4, 2, dropout=0.1), nn.BatchNorm2d(4),
    nn.InstanceNorm2d(4, track_running_stats=True),
], ids=lambda module: type(module).__name__)
def test_what_draws_or_mixes_in_training_is_not_cut(module):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(module))
    assert not training.separable(network) and training.separable(network.eval())


def test_what_treats_each_image_for_itself_is_cut():
    each = [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.MultiheadAttention(4, 1), nn.LSTM(4, 4)]
    assert training.separable(nn.ModuleList(each)) and training.separable(networks.fresh("convnet", GEOMETRY, 0))


def test_standardised_batches_have_mean_0_and_deviation_1():
    data = make_set()
    images = data.batch(torch.tensor([3, 5, 8]), standardise=True)
    raw = data.batch(torch.tensor([3, 5, 8])).double()
    expected = (raw - raw.mean()) / (raw - raw.mean()).square().mean().sqrt()
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    constant = ImageSet.of(torch.ones(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(constant.batch(torch.arange(2), standardise=True), torch.zeros(2, 1, 8, 8))


def test_accuracy_counts_the_right_answers(monkeypatch):
    monkeypatch.setattr(workers, "POOL_PIECE_PIXELS", 3 * 64)

    class Fixed(nn.Module):
        def forward(self, images):
            return F.one_hot(images[:, 0, 0, 0].long(), 3).float()

    said = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))
    data = ImageSet.of(said[:, None, None, None].expand(50, 1, 8, 8).float(), labels)
    with Pool(CPU, 2) as pool:
        found = training.accuracies([Fixed(), Fixed()], data, pool, batch=16)
    assert found == [(said == labels).sum().item() / 50] * 2


@pytest.mark.parametrize("name,device", [("vit", "cpu"), ("mlp", "meta")])
def test_a_stopped_pool_stops_what_is_not_cut_into_pieces(name, device):
    """Dropout wants the whole batch, and a device other than the CPU takes it whole: they must not go on to the end."""
    network, data, done = networks.fresh(name, GEOMETRY, 0), make_set(), []
    with Pool(torch.device(device)) as pool:
        def stop() -> None:
            done.append(1)
            pool.stopped = True

        with pytest.raises(workers.Stopped):
            training.epoch(network, data, torch.Generator(), pool, stop, batch=5, augment=False, standardise=False)
    assert len(done) == 1
