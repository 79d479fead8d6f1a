"""RealData: what it holds, samples and says, on the embedded digits."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from speedk import data
from speedk.data.real import fingerprint
from speedk.errors import ConfigError


@pytest.fixture(scope="module")
def digits() -> data.RealData:
    return data.load("digits")


def test_digits_are_the_1797_split_by_class(digits):
    from sklearn.datasets import load_digits

    assert digits.geometry.classes == 10 and digits.geometry.channels == 1 and digits.geometry.resolution == 32
    assert digits.train.images.shape[1:] == (1, 32, 32) and digits.train.images.dtype == torch.uint8
    totals = np.bincount(load_digits().target)
    test = torch.bincount(digits.test.labels).numpy()
    assert (torch.bincount(digits.train.labels).numpy() + test == totals).all()
    assert (test == np.round(0.2 * totals)).all()
    assert digits.split == "stratified 80/20, seed 0" and "8x8 originals" in digits.note and "64 values" in digits.note


def test_digits_at_their_own_size_are_the_originals():
    from sklearn.datasets import load_digits

    small = data.load("digits", resolution=8)
    originals = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    known = {image.tobytes(): int(label) for image, label in zip(originals, load_digits().target, strict=True)}
    images = torch.cat([small.train.images, small.test.images])[:, 0].numpy()
    labels = torch.cat([small.train.labels, small.test.labels]).tolist()
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in originals)
    assert [known[image.tobytes()] for image in images] == labels
    assert small.note == ""


def test_some_classes_alone(digits):
    part = digits.only(data.listed("7, 2-3"))
    assert part.class_names == ("7", "2", "3") and part.geometry.classes == 3 and part.cut and not digits.cut
    for name in ("train", "test"):
        own, whole = getattr(part, name), getattr(digits, name)
        for label, digit in enumerate((7, 2, 3)):
            assert torch.equal(own.images[own.labels == label], whole.images[whole.labels == digit])
        assert len(own) == int(torch.isin(whole.labels, torch.tensor([7, 2, 3])).sum())
    assert part.normaliser is digits.normaliser and part.fingerprint != digits.fingerprint
    assert part.fingerprint == fingerprint(part.class_names, part.train, part.test)
    assert part.describe()["classes"] == ["7", "2", "3"] and "classes" not in digits.describe()
    assert part.note == f"{digits.note}; 3 of its 10 classes"
    assert torch.equal(part.sample(0, 10**6, torch.Generator().manual_seed(0)).sum(),
                       digits.sample(7, 10**6, torch.Generator().manual_seed(0)).sum())
    assert data.listed(" Shih-Tzu,9 - 11,") == ["Shih-Tzu", "9 - 11"] and data.listed("9-11") == ["9", "10", "11"]
    with pytest.raises(ConfigError, match="5-3 has no class in it"):
        data.listed("1,5-3")
    for wanted, said in ((["10"], "has no class '10', by name or by number from 0 to 9"), (["1"], "two or more"),
                         (["1", "1"], "none of them twice"), ([], "two or more")):
        with pytest.raises(ConfigError, match=said):
            digits.only(wanted)


def test_digits_are_the_same_every_time(digits):
    assert data.load("digits").fingerprint == digits.fingerprint
    assert digits.fingerprint == "6b2e96bf24cadfe6560fe9c5177679fdaf89905c35ce34ae770a8736b16e953b"


def test_fingerprint_sees_names_images_labels_and_order(digits):
    names, train, test = digits.class_names, digits.train, digits.test
    changed = train.images.clone()
    changed[5, 0, 3, 3] ^= 1
    labels = test.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    marks = {
        fingerprint(names, train, test),
        fingerprint((*names[:9], "nine"), train, test),
        fingerprint(names, data.Subset(changed, train.labels), test),
        fingerprint(names, train, data.Subset(test.images, labels)),
        fingerprint(names, test, train),
        fingerprint(names, data.Subset(train.images.view(-1, 1, 16, 64), train.labels), test),
    }
    assert len(marks) == 6 and digits.fingerprint in marks


def test_sample_draws_from_the_class_without_replacement(digits):
    whole = digits.normalised("train")
    for label in (0, 7):
        members = whole[digits.train.labels == label]
        drawn = digits.sample(label, 10**6, torch.Generator().manual_seed(1))
        assert drawn.dtype == torch.float32 and drawn.shape == members.shape
        assert not torch.equal(drawn, members)
        assert torch.equal(drawn.flatten(1).sum(1).sort().values, members.flatten(1).sum(1).sort().values)
    few = digits.sample(3, 20, torch.Generator().manual_seed(2))
    again = digits.sample(3, 20, torch.Generator().manual_seed(2))
    other = digits.sample(3, 20, torch.Generator().manual_seed(3))
    assert len(few) == 20 and torch.equal(few, again) and not torch.equal(few, other)
    assert len(few.flatten(1).unique(dim=0)) == 20


def test_sample_refuses_a_label_that_is_none(digits):
    with pytest.raises(ValueError, match="label 10 is not in 0..9"):
        digits.sample(10, 1, torch.Generator())
    with pytest.raises(ValueError, match="label -1"):
        digits.sample(-1, 1, torch.Generator())


def test_sample_covers_the_class_evenly(digits):
    generator = torch.Generator().manual_seed(0)
    size = int((digits.train.labels == 0).sum())
    members = digits.normalised("train")[digits.train.labels == 0].flatten(1)
    seen = torch.zeros(size)
    for _ in range(300):
        drawn = digits.sample(0, 20, generator).flatten(1)
        seen[torch.cdist(drawn, members).argmin(1)] += 1
    expected = 300 * 20 / size
    assert ((seen - expected).abs() < 6 * expected**0.5).all()


def test_normalised_has_zero_mean_and_unit_deviation(digits):
    images = digits.normalised("train").double()
    assert abs(images.mean()) < 1e-6 and abs(images.std(correction=0) - 1) < 1e-6
    index = torch.tensor([3, 1, 3])
    assert torch.equal(digits.normalised("test", index), digits.normalised("test")[index])
    with pytest.raises(ValueError, match="neither"):
        digits.normalised("valid")


def test_describe_is_json(digits):
    found = json.loads(json.dumps(digits.describe()))
    assert found["name"] == "digits" and found["train"] == 1438 and found["test"] == 359
    assert found["fingerprint"] == digits.fingerprint and found["split"] and found["note"]


def test_to_keeps_what_is_there(digits):
    assert digits.to("cpu") is digits
    meta = digits.to("meta")
    assert meta.train.images.device.type == "meta" and meta.test.labels.device.type == "meta"
    assert dataclasses.asdict(meta.geometry) == dataclasses.asdict(digits.geometry)


@pytest.mark.parametrize("options, said", [
    ({}, "give the name of a data set or a folder"),
    ({"name": "cifar"}, "did you mean 'cifar10'"),
    ({"name": "digits", "path": "."}, "embedded"),
    ({"name": "digits", "normaliser": "whiten"}, "normaliser 'whiten'"),
    ({"name": "digits", "resolution": 0}, "resolution 0"),
    ({"name": "digits", "resolution": 32.0}, "resolution 32.0"),
    ({"name": "digits", "split": "ilsvrc"}, "split 'ilsvrc'"),
    ({"name": "imagefruit", "split": "fastai"}, "imagefruit has 'ilsvrc'"),
    ({"path": ".", "split": "fastai"}, "no other split"),
])
def test_options_that_do_not_exist(options, said):
    with pytest.raises(ConfigError) as caught:
        data.load(**options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
