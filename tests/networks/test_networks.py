"""Networks: the published parameter counts, the maths of a block, reproducible starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from speedk import networks
from speedk.errors import ConfigError
from speedk.geometry import Geometry

CIFAR10, CIFAR100, TINY = Geometry(10, 3, 32), Geometry(100, 3, 32), Geometry(200, 3, 64)
IMAGENET128, IMAGENET256, DIGITS = Geometry(10, 3, 128), Geometry(10, 3, 256), Geometry(10, 1, 32)


@pytest.mark.parametrize(("name", "geometry", "count"), [
    ("convnet", CIFAR10, 320_010),
    ("convnet", CIFAR100, 504_420),
    ("convnet", TINY, 857_160),
    ("convnet", IMAGENET128, 615_690),
    ("convnet", IMAGENET256, 763_530),
    ("mlp", CIFAR10, 411_146),
    ("mlp", CIFAR100, 422_756),
    ("mlp", TINY, 1_615_304),
    ("resnet18", CIFAR10, 11_173_962),
    ("resnet18", CIFAR100, 11_220_132),
    ("resnet18", TINY, 11_271_432),
    ("vit", CIFAR10, 9_523_722),
    ("vit", CIFAR100, 9_569_892),
    ("vit", TINY, 9_719_496),
])
def test_published_parameter_counts(name, geometry, count):
    assert networks.parameter_count(networks.build(name, geometry)) == count


def test_what_the_parameters_of_a_vit_do_not_tell():
    vit = networks.build("vit", CIFAR10)
    assert [block.heads for block in vit.blocks] == [8] * 6 and vit.patch.kernel_size == (4, 4)
    assert {module.p for module in vit.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


@pytest.mark.parametrize(("resolution", "depth"), [(8, 1), (16, 2), (28, 3), (32, 3), (64, 4), (128, 5), (256, 6)])
def test_depth_follows_the_resolution(resolution, depth):
    assert len(networks.build("convnet", Geometry(2, 1, resolution), width=4).convolutions) == depth


@pytest.mark.parametrize("name", networks.names())
@pytest.mark.parametrize("geometry", [DIGITS, CIFAR10])
def test_the_classifier_reads_the_features(name, geometry):
    network = networks.fresh(name, geometry, seed=0).eval()
    assert network.__doc__
    images = torch.randn(3, geometry.channels, geometry.resolution, geometry.resolution)
    features, logits = network.features(images), network(images)
    assert features.dim() == 2 and features.shape[0] == 3
    assert logits.shape == (3, geometry.classes)
    torch.testing.assert_close(logits, network.classifier(features))
    logits.square().sum().backward()
    for key, p in network.named_parameters():
        assert p.grad is not None, key
        assert p.dim() == 1 or p.grad.abs().sum() > 0, key  # a bias before a norm has no gradient


def test_overrides_and_their_errors():
    network = networks.build("convnet", CIFAR10, depth=2, width=8)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert network.features(torch.randn(1, 3, 32, 32)).shape == (1, 8 * 8 * 8)
    with pytest.raises(ConfigError, match="'widht'.*did you mean 'width'"):
        networks.build("convnet", CIFAR10, widht=8)
    with pytest.raises(ConfigError, match="'convnt'.*did you mean 'convnet'"):
        networks.build("convnt", CIFAR10)
    with pytest.raises(ConfigError, match="depth 6 needs .* 64 pixels"):
        networks.build("convnet", CIFAR10, depth=6)


def test_fresh_is_a_function_of_its_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = networks.fresh("convnet", DIGITS, seed=3, width=8).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = networks.fresh("convnet", DIGITS, seed=3, width=8).state_dict()
    other = networks.fresh("convnet", DIGITS, seed=4, width=8).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_networks_made_in_threads_have_the_values_of_their_seeds():
    geometry = Geometry(3, 3, 16)
    alone = [networks.fresh("convnet", geometry, seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(lambda seed: networks.fresh("convnet", geometry, seed), range(16)))
    for a, b in zip(alone, beside, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
