"""Channel statistics and descriptions, the hostile ones too."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from speedk.data import from_description
from speedk.data.normaliser import ChannelNormaliser, channel_statistics
from speedk.errors import DataError


def images(count=20, channels=3, side=6, seed=0) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_all_pixels():
    x = images(300)
    found = channel_statistics(x)
    reference = x.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert np.abs(np.array(found.mean) - reference.mean(1)).max() < 1e-15
    assert np.abs(np.array(found.std) - reference.std(1)).max() < 1e-15
    shuffled = channel_statistics(x[torch.randperm(300)])
    assert (found.mean, found.std) == (shuffled.mean, shuffled.std)


def test_statistics_do_not_overflow():
    x = torch.full((3000, 1, 64, 64), 255, dtype=torch.uint8)
    x[0] = 0
    share = 2999 / 3000
    assert math.isclose(channel_statistics(x).mean[0], share, rel_tol=1e-12)
    assert math.isclose(channel_statistics(x).std[0], math.sqrt(share * (1 - share)), rel_tol=1e-12)


def test_normalise_and_back():
    x = images()
    normaliser = ChannelNormaliser((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    z = normaliser.normalise(x)
    expected = (x.double() / 255 - torch.tensor([0.1, 0.5, 0.9])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None]
    assert z.dtype == torch.float32 and (z - expected).abs().max() < 2e-6
    assert (normaliser.normalise(x.float() / 255) - z).abs().max() < 2e-6
    assert (normaliser.normalise(x.double() / 255)).dtype == torch.float32
    assert (normaliser.unit(z) * 255).round().to(torch.uint8).equal(x)
    assert normaliser.unit(z * 100).min() == 0 and normaliser.unit(z * 100).max() == 1
    assert normaliser.normalise(x[:0]).shape == (0, 3, 6, 6)


def test_inputs_are_left_alone():
    x = images().float() / 255
    before = x.clone()
    normaliser = channel_statistics(images())
    normaliser.unit(normaliser.normalise(x))
    assert torch.equal(x, before)


def test_description_comes_back_exactly():
    normaliser = channel_statistics(images())
    again = from_description(json.loads(json.dumps(normaliser.describe())))
    assert (again.mean, again.std) == (normaliser.mean, normaliser.std)
    assert from_description({"kind": "channel", "mean": [0], "std": [1]}).std == (1.0,)


HASH = "0" * 64
ZCA = {"kind": "zca", "eps": 0.1, "shape": [3, 8, 8], "data": HASH, "matrix": HASH}


@pytest.mark.parametrize("description", [
    None, [], "channel", {}, {"kind": None}, {"kind": []}, {"kind": "other"},
    {"kind": "channel"}, {"kind": "channel", "mean": [0.5]},
    {"kind": "channel", "mean": [0.5], "std": [0.5], "path": "/etc/passwd"},
    {"kind": "channel", "mean": 0.5, "std": 0.5}, {"kind": "channel", "mean": "0", "std": "1"},
    {"kind": "channel", "mean": [0.5], "std": [0.0]}, {"kind": "channel", "mean": [0.5], "std": [-1]},
    {"kind": "channel", "mean": [float("nan")], "std": [1]}, {"kind": "channel", "mean": [0.1], "std": [math.inf]},
    {"kind": "channel", "mean": [True], "std": [1]}, {"kind": "channel", "mean": ["0"], "std": [1]},
    {"kind": "channel", "mean": [0.5, 0.5], "std": [1, 1]}, {"kind": "channel", "mean": [0.5], "std": [1, 1, 1]},
    {"kind": "channel", "mean": [10**400], "std": [1]}, {"kind": "channel", "mean": [], "std": []},
    {**ZCA, "eps": 0}, {**ZCA, "eps": True}, {**ZCA, "eps": "0.1"}, {**ZCA, "eps": math.nan}, {**ZCA, "eps": 1e300},
    {**ZCA, "shape": [3, 8]}, {**ZCA, "shape": [3, 8, 8.0]}, {**ZCA, "shape": [3, -8, 8]}, {**ZCA, "shape": None},
    {**ZCA, "shape": [3, 4096, 4096]}, {**ZCA, "shape": [3, 10**9, 1]}, {**ZCA, "shape": [True, 8, 8]},
    {**ZCA, "data": "../../etc/passwd"}, {**ZCA, "data": HASH[:-1]}, {**ZCA, "data": HASH + "\n"}, {**ZCA, "data": 3},
    {**ZCA, "matrix": HASH.replace("0", "G")}, {**ZCA, "matrix": None}, {**ZCA, "extra": 1},
    {key: value for key, value in ZCA.items() if key != "eps"},
])
def test_hostile_descriptions_are_one_line(description):
    with pytest.raises(DataError) as caught:
        from_description(description)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
