"""What speedk.unroll holds: little in a step, and of the steps' graphs no more than `memory` bytes."""

from __future__ import annotations

import gc

import pytest
import torch
from peaks import in_use, usual_peak
from toys import DEVICES

import speedk
from speedk import networks
from speedk.distillation import unroll as unroll_module
from speedk.distillation.unroll import dsa_steps
from speedk.distillation.unroll.graph import Training
from speedk.geometry import Geometry


def unrolled(name, geometry, device="cpu", batch=4, augment=None, **sizes):
    """A call that unrolls steps on batches of so many images, and back; `batch` may be one size for each step."""
    student = networks.fresh(name, geometry, 0, device, **sizes)
    theta = torch.cat([p.detach().flatten() for p in student.parameters()])
    side, lr = geometry.resolution, torch.tensor(0.01, requires_grad=True, device=device)

    def call(steps, memory):
        counts = [batch] * steps if isinstance(batch, int) else batch[:steps]
        images = torch.randn(max(counts), geometry.channels, side, side, device=device, requires_grad=True)
        labels = torch.arange(max(counts), device=device) % geometry.classes
        schedule = [torch.arange(count) for count in counts]
        speedk.unroll(student, theta, images, labels, schedule, lr, augment=augment, memory=memory).sum().backward()

    return call


@pytest.mark.parametrize("device", DEVICES)
def test_memory_hardly_grows_with_the_steps(device):
    """By theta and m, 2.6 MB a step at P = 320,010; at most 4."""
    call = unrolled("convnet", Geometry(10, 3, 32), device)
    call(2, "full")
    five = usual_peak(lambda: call(5, "constant"), device)
    assert (usual_peak(lambda: call(60, "constant"), device) - five) / 55 < 4e6
    assert (usual_peak(lambda: call(20, "full"), device) - five) / 15 > 6e6  # so that the line above can fail


@pytest.fixture
def held(monkeypatch, device):
    """What is allocated as each step is taken, forward and then back: a list, to be cleared before each call."""
    samples = []

    def spied(op):
        def spy(*args):
            samples.append(in_use(device))
            return op(*args)

        return spy

    for name in ("unroll_step", "unroll_step_adjoint"):
        monkeypatch.setattr(unroll_module, name, spied(getattr(unroll_module, name)))
    return samples


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("sizes", "batch", "augmented", "limit"), [
    ({"name": "convnet", "width": 16, "depth": 2}, 8, False, 16e6),
    # P = 411,146: the pieces' gradients would be far larger than what their graphs hold,
    ({"name": "mlp"}, 64, False, 10e6),
    ({"name": "mlp"}, 64, True, 30e6),  # and what an augmentation saves is, too.
])
def test_what_is_kept_keeps_to_the_limit(sizes, batch, augmented, limit, device, held):
    call = unrolled(**sizes, geometry=Geometry(10, 3, 32), device=device, batch=batch,
                    augment=(lambda images, step: images.sin().exp().tanh()) if augmented else None)
    call(2, "full")

    def samples(memory):
        held.clear()
        gc.collect()
        call(30, memory)
        assert len(held) == 60
        return list(held)

    constant = samples("constant")

    def beyond(memory) -> int:
        return max(a - b for a, b in zip(samples(memory), constant, strict=True))

    assert beyond("full") > 1.5 * limit  # so that the next line can fail
    assert 0.5 * limit < beyond(int(limit)) < 1.05 * limit


def test_the_last_steps_are_kept_as_many_as_fit(monkeypatch):
    """Batches of two sizes, and augmentations of which some save more than others."""
    built, bytes_of = [], []
    build = Training.build

    def spy(training, step, *rest):
        made = build(training, step, *rest)
        built.append(step)
        bytes_of.append(made[0].bytes)
        return made

    monkeypatch.setattr(Training, "build", spy)
    counts = [4, 2, 4, 4, 2, 4, 4, 2]
    call = unrolled("convnet", Geometry(3, 1, 8), batch=counts, augment=dsa_steps(1), depth=2, width=4)

    def kept(memory):
        built.clear()
        bytes_of.clear()
        call(len(counts), memory)
        assert built[:len(counts)] == list(range(len(counts)))
        again = built[len(counts):]  # what was not kept is built again, last step first
        assert again == list(reversed(range(len(again))))
        return len(counts) - len(again)

    assert kept(10**12) == len(counts) and min(bytes_of) > 0
    sizes = list(bytes_of)
    assert len(set(sizes)) > 2
    for count in range(1, len(counts)):
        fits = sum(sizes[-count:])
        assert kept(fits) == count and kept(fits - 1) == count - 1
    assert kept("constant") == 0 and kept("full") == len(counts)
