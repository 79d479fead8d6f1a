"""speedk.unroll by recorded steps: the bits of the steps themselves, whatever came between."""

from __future__ import annotations

import pytest
import torch
from replayed import eagerly, given, recorded, replaying, results, same
from toys import DEVICES
from unrolled import STUDENTS, gradients

import speedk
from speedk import networks
from speedk.distillation.unroll import dsa_steps, replay
from speedk.geometry import Geometry


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    with replaying(request.param, monkeypatch) as device:
        yield device


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("memory", ["constant", "full", 20_000, 60_000])
@pytest.mark.parametrize("learned", ["all", "images", "theta", "nothing"])
def test_the_same_bits(memory, momentum, learned, device):
    """Two shapes of batches, of which the short one comes once a call, and an augmentation."""
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device, soft=learned == "all")
    for name, leaf in zip(("theta", "images", "labels", "lr"), leaves, strict=True):
        if learned not in ("all", name):
            leaf.requires_grad_(False)
    moved = lambda images, step: dsa_steps(3)(images, step) * (1 + torch.rand(()).item())  # noqa: E731
    how = {"memory": memory, "momentum": momentum, "augment": None if momentum else moved}
    with eagerly():
        want = results(student, leaves, schedule, direction, **how)
    assert not recorded(student)
    state = torch.get_rng_state()
    for call in range(6):
        assert same(results(student, leaves, schedule, direction, **how), want)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(recorded(student)) == (2 if call > 3 else 1)


def test_a_network_of_many_parts(device):
    student = networks.fresh("resnet18", Geometry(classes=3, channels=1, resolution=9), 0, width=4)
    (theta, _, labels, lr), schedule, direction = given(student, device)
    leaves = theta, torch.randn(10, 1, 9, 9, device=device, requires_grad=True), labels, lr
    schedule = schedule[:-1]
    for memory in ("constant", "full"):
        with eagerly():
            want = results(student, leaves, schedule, direction, memory=memory)
        for _ in range(2):
            assert same(results(student, leaves, schedule, direction, memory=memory), want)
    assert len(recorded(student)) == 2


@pytest.mark.parametrize("memory", ["constant", "full", 30_000])
def test_two_at_a_time(memory, device):
    """Both go forward before either goes back, in either order, and one is never gone back."""
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    others = [t.detach().flip(0).requires_grad_() if t.dim() else t for t in leaves]
    with eagerly():
        want = [results(student, some, schedule, direction, memory=memory)[1:] for some in (leaves, others)]
    results(student, leaves, schedule, direction, memory=memory)
    for order in ((0, 1), (1, 0)):
        ends = [speedk.unroll(student, *some[:3], schedule, some[3], memory=memory) for some in (leaves, others)]
        speedk.unroll(student, *leaves[:3], schedule, leaves[3], memory=memory)
        for i in order:
            assert same(gradients(ends[i], direction, (leaves, others)[i]), want[i])


def test_what_another_replay_has_overwritten(device):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    results(student, leaves, schedule, direction, memory="full")
    theta, images, labels, _ = leaves
    schedule = [index.to(device) for index in schedule]
    training = replay.training(student, schedule, None, None, images.device, -1, True)
    with eagerly():
        plain = replay.training(student, schedule, None, None, images.device, -1, True)

    def steps(training, count):
        return [training.build(step, theta, images, labels, (True, True), pool) for step in range(count)]

    with plain.running() as pool:
        (graph, gradient), = steps(plain, 1)
        want = gradient, *graph.adjoint(direction, True, pool)
    with training.running() as pool:
        (first, gradient), (second, _) = steps(training, 2)
        assert isinstance(first, replay.Replayed) and second.hold() and not first.hold()
        assert same((gradient, *first.adjoint(direction, True, pool)), want)
        assert same((gradient, *first.adjoint(direction, True, pool)), want)  # by then it is gone


def test_a_replay_that_is_broken_off_has_overwritten_the_last_one(device, monkeypatch):
    student = STUDENTS["convnet"]()
    (theta, images, labels, _), schedule, direction = leaves, schedule, direction = given(student, device)
    results(student, leaves, schedule, direction)
    recording, = recorded(student)
    schedule = [index.to(device) for index in schedule]
    training = replay.training(student, schedule, None, None, images.device, -1, False)
    for part in ("_forward", "_backward"):
        with training.running() as pool:
            first, second = (training.build(step, theta, images, labels, (True, True), pool)[0] for step in (0, 1))
            want = first.adjoint(direction, True, pool)
            last, _ = training.build(0, theta, images, labels, (True, True), pool)

            def stop():
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(recording, part, stop)
                second.adjoint(direction, True, pool)
            assert same(last.adjoint(direction, True, pool), want)


def test_as_many_as_fit_are_kept(device, monkeypatch):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    schedule, kept = schedule[:-1], []
    for _ in range(2):
        results(student, leaves, schedule, direction, memory=10**9)
    recording, = recorded(student)
    adjoint = replay._Recording.adjoint
    monkeypatch.setattr(replay._Recording, "adjoint",
                        lambda *a: kept.append(a[3] is not None) or adjoint(*a))
    images = 4 * leaves[1][0].nbytes + 4 * leaves[2][0].nbytes  # as they are augmented: not at all
    for count in (1, 3, 6):
        for over in (0, 1):
            kept.clear()
            results(student, leaves, schedule, direction, memory=count * (recording.bytes + images) - over)
            assert not kept.pop(0)  # the last step: the backward pass begins in what its replay left
            assert sum(kept) == count - over and kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(("memory", "again"), [("constant", 6), ("full", 0)])
def test_the_last_step_is_differentiated_where_it_is(memory, again, device, monkeypatch):
    """But where another replay came between."""
    student, counts = STUDENTS["convnet"](), []
    (theta, images, labels, lr), schedule, direction = leaves, schedule, direction = given(student, device)
    schedule = schedule[:7]
    for _ in range(2):
        want = results(student, leaves, schedule, direction, memory=memory)[1:]
    step = replay._Recording._step
    monkeypatch.setattr(replay._Recording, "_step", lambda *a: counts.append(1) or step(*a))
    for between in (0, 1):
        end = speedk.unroll(student, theta, images, labels, schedule, lr, memory=memory)
        if between:
            speedk.unroll(student, theta.detach().flip(0), images, labels, schedule[:1], lr, memory=memory)
        counts.clear()
        assert same(gradients(end, direction, leaves), want)
        assert len(counts) == again + between
