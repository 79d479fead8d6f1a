"""What speedk.unroll records, anew where it must and not where it cannot, and what becomes of it."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from replayed import Rerun, eagerly, given, recorded, replaying, results, same
from torch import nn
from toys import DEVICES
from unrolled import GEOMETRY, STUDENTS

import speedk
from speedk import networks
from speedk.distillation.unroll import replay
from speedk.errors import ConfigError


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    with replaying(request.param, monkeypatch) as device:
        yield device


def test_what_is_computed_differently_is_recorded_anew(device):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    schedule = schedule[:-1]

    def check():
        with eagerly():
            want = results(student, leaves, schedule, direction)
        assert same(results(student, leaves, schedule, direction), want)
        return want

    seen = [check()]
    networks.set_precision(student, "convnet", "bf16")
    seen.append(check())
    student.convolutions[0].weight.requires_grad_(False)
    seen.append(check())
    with speedk.use_backend("torch"):
        check()
    assert len(recorded(student)) == 4 and not any(same(a, b) for i, a in enumerate(seen) for b in seen[:i])
    networks.set_precision(student, "convnet", "float32")
    student.convolutions[0].weight.requires_grad_()
    before = recorded(student)
    assert same(check(), seen[0]) and recorded(student) == before


def test_few_are_kept(device, monkeypatch):
    monkeypatch.setattr(replay, "RECENT", 30)
    student = STUDENTS["convnet"]()
    leaves, _, direction = given(student, device)
    for size in range(1, 8):
        schedule = [torch.arange(size)] * 10
        with eagerly():
            want = results(student, leaves, schedule, direction)
        for _ in range(2):
            assert same(results(student, leaves, schedule, direction), want)
    assert [len(r._inputs[1]) for r in recorded(student)] == [4, 5, 6, 7]
    schedule = [torch.arange(size) for size in range(1, 8)] * 6
    results(student, leaves, schedule, direction)
    kept = recorded(student)
    results(student, leaves, schedule, direction)
    assert recorded(student) == kept and len(kept) == 4  # all of them in use


class Failing(Rerun):
    error, after = RuntimeError("operation not permitted when stream is capturing"), 0

    def record(self, function):
        if len(self.made) >= self.after:
            raise self.error
        return super().record(function)


class Still(Rerun):
    def record(self, function):
        return lambda: None, function()


@pytest.mark.parametrize("recorder", [Failing, Still])
def test_what_cannot_be_recorded_runs_as_it_is(recorder, device, monkeypatch, caplog):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    with eagerly():
        want = results(student, leaves, schedule, direction)
    monkeypatch.setattr(replay, "recorder_of", lambda device: recorder)
    with caplog.at_level(logging.DEBUG, replay.__name__):
        for _ in range(3):
            assert same(results(student, leaves, schedule, direction), want)
    told, = (record.exc_text for record in caplog.records)  # once, with its reason
    assert ("not permitted" if recorder is Failing else "gives other bits") in told and not recorded(student)


def test_without_memory_for_one_there_is_none(device, monkeypatch):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    monkeypatch.setattr(Failing, "error", torch.OutOfMemoryError("none is left"))
    monkeypatch.setattr(Failing, "after", 2)
    monkeypatch.setattr(replay, "recorder_of", lambda device: Failing)
    with eagerly():
        want = results(student, leaves, schedule, direction)
    for memory, count in (("constant", 1), ("full", 0), ("constant", 0)):
        assert same(results(student, leaves, schedule, direction, memory=memory), want)
        assert len(recorded(student)) == count


class Own(nn.Module):
    per_sample = True

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(64, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.linear(images.flatten(1)) * getattr(self, "scale", 1)


def test_only_where_it_is_safe(device):
    buffered = Own()
    buffered.register_buffer("scale", torch.ones(()))
    hooked = Own()
    hooked.linear.register_forward_hook(lambda *_: None)
    mixing = Own()
    mixing.per_sample = False
    loss = lambda logits, labels: logits.square().mean()  # noqa: E731
    fixed = Own(scale=torch.ones((), device=device))
    dropping, dropped = Own(drop=nn.Dropout()), Own(drop=nn.Dropout()).eval()
    for student, how, there in (
            (Own(), {}, 1), (Own(scale=2.0), {}, 1), (Own(sizes=[1, 2]), {}, 1), (Own(geometry=GEOMETRY), {}, 1),
            (Own(act=torch.relu, norm=nn.functional.layer_norm), {}, 1), (Own(act=lambda x: fixed), {}, 0),
            (Own(held={"a": 1}), {}, 0), (dropped, {}, 1), (dropping, {}, 0), (fixed, {}, 0), (buffered, {}, 0),
            (hooked, {}, 0), (mixing, {}, 0), (Own(), {"loss": loss}, 0)):
        leaves, schedule, direction = given(student, device)
        results(student, leaves, schedule, direction, **how)
        assert len(recorded(student)) == there
    student = Own(scale=2.0)
    leaves, schedule, direction = given(student, device)
    with torch.autocast(device, torch.bfloat16):
        results(student, leaves, schedule, direction)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        results(student, leaves, schedule, direction)
    assert not recorded(student)
    results(student, leaves, schedule[:4], direction)
    assert not recorded(student)  # what is run a few times
    first = results(student, leaves, schedule, direction)
    student.scale = 3.0
    assert len(recorded(student)) == 1 and not same(results(student, leaves, schedule, direction), first)


class Reshaped(Own):
    def forward(self, images):
        return images.flatten(1) @ self.linear.weight.reshape(64, 3) * len(self.linear.weight)


def test_parameters_of_other_shapes(device):
    student = Reshaped()
    leaves, schedule, direction = given(student, device)
    results(student, leaves, schedule, direction)
    assert recorded(student)
    student.linear.weight = nn.Parameter(torch.empty(64, 3, device=device))
    with eagerly():
        want = results(student, leaves, schedule, direction)
    assert same(results(student, leaves, schedule, direction), want)


def test_many_kinds(device, monkeypatch):
    monkeypatch.setattr(replay, "MANY", 2)
    monkeypatch.setattr(replay, "RECENT", 10)
    student = Own()
    leaves, schedule, direction = given(student, device)
    for scale in (1.0, 2.0, 3.0, 1.0, 4.0, 5.0):
        student.scale = scale
        with eagerly():
            want = results(student, leaves, schedule, direction)
        assert same(results(student, leaves, schedule, direction), want)
    known, = replay._of_students[student].values()
    assert len(known._kinds) <= 2 and len(known._eager) <= 2 and len(known._found) <= 4


class ByStrides(Own):
    def forward(self, images):
        return super().forward(images) * (2 if images.is_contiguous() else 1)


def test_images_that_lie_otherwise_than_a_copy_does(device):
    student = ByStrides()
    leaves, schedule, direction = given(student, device)
    cut = lambda images, step: nn.functional.pad(images, (0, 1))[..., :-1]  # noqa: E731
    with eagerly():
        want = results(student, leaves, schedule, direction, augment=cut)
    for _ in range(2):
        assert same(results(student, leaves, schedule, direction, augment=cut), want)
    assert not recorded(student)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("stash", "there"), [(lambda x: torch.full_like(x, 2.0), 2), (lambda x: x > 0, 0)])
def test_what_a_graph_holds_unseen(stash, there):
    """Tensors that a function of the student's own keeps without `save_for_backward`."""
    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.by = stash(x)
            return x * ctx.by

        @staticmethod
        def backward(ctx, d_out):
            return d_out * ctx.by

    class Stashing(Own):
        def forward(self, images):
            return Times.apply(super().forward(images))

    student = Stashing()
    leaves, schedule, direction = given(student, "cuda")
    schedule = schedule + schedule[-1:] * 6
    with eagerly():
        want = results(student, leaves, schedule, direction, memory="full")
    for _ in range(2):
        assert same(results(student, leaves, schedule, direction, memory="full"), want)
    assert len(recorded(student)) == there


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_student_that_waits_for_the_gpu():
    """CUDA calls its recording off, and nothing of that stays behind."""
    class Waiting(Own):
        def forward(self, images):
            return super().forward(images) * (1 + abs(images.sum().item()))

    for student in (Waiting(), Own()):
        leaves, schedule, direction = given(student, "cuda")
        with eagerly():
            want = results(student, leaves, schedule, direction)
        for _ in range(2):
            assert same(results(student, leaves, schedule, direction), want)
        torch.cuda.empty_cache()
        torch.rand((), device="cuda")  # the generator knows that it is over
        assert len(recorded(student)) == (type(student) is Own)


def test_a_torch_without_a_name_that_is_asked_for(device, monkeypatch):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device)
    with eagerly():
        want = results(student, leaves, schedule, direction)
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    for _ in range(3):
        assert same(results(student, leaves, schedule, direction), want)
    assert not recorded(student)


def test_it_can_be_turned_off(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv("SPEEDK_CUDA_GRAPHS", raising=False)
    assert replay.recorder_of(cuda) is replay.Recorder
    assert replay.recorder_of(torch.device("cpu")) is None
    monkeypatch.setenv("SPEEDK_CUDA_GRAPHS", "0")
    assert replay.recorder_of(cuda) is None


def test_labels_are_still_looked_at(device):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device, soft=False)
    results(student, leaves, schedule, direction)
    theta, images, labels, lr = leaves
    assert recorded(student)
    with pytest.raises(ConfigError, match="there is a label 3 but the student gives 3 logits"):
        speedk.unroll(student, theta, images, labels + 1, schedule, lr)


def test_an_error_of_the_users_says_nothing_of_the_kind(device):
    student = STUDENTS["convnet"]()
    leaves, schedule, direction = given(student, device, soft=False, steps=replay.EAGER)
    theta, images, labels, lr = leaves
    results(student, leaves, [schedule[0]] * replay.EAGER, direction)
    with pytest.raises(ConfigError, match="there is a label"):  # met by the step that is to be recorded
        speedk.unroll(student, theta, images, labels + 3, schedule[:1], lr)
    assert not recorded(student)
    results(student, leaves, schedule[:1], direction)
    assert len(recorded(student)) == 1


def test_recordings_go_with_their_student(device, monkeypatch):
    if device == "cpu":  # where the stand-in would hold what it runs
        monkeypatch.setattr(replay, "recorder_of", lambda device: Still)
        monkeypatch.setattr(replay._Recording, "_same", lambda *_: True)
    student = STUDENTS["convnet"]()
    for memory in ("constant", "full"):
        leaves, schedule, direction = given(student, device)
        results(student, leaves, schedule, direction, memory=memory)
    kept = [weakref.ref(recording) for recording in recorded(student)]
    assert len(kept) == 2 and len(replay._of_students) == 1
    del student
    gc.collect()
    assert not replay._of_students and not any(ref() for ref in kept)


def test_a_student_that_leaves_its_parameters_is_refused_where_steps_were_recorded(device):
    class Leaving(Own):
        apart = False

        def forward(self, images):
            return images.flatten(1)[:, :3] if self.apart else super().forward(images)

    student = Leaving()
    leaves, schedule, direction = given(student, device)
    results(student, leaves, schedule, direction)
    assert recorded(student)
    student.apart = True
    with pytest.raises(ConfigError, match="the loss hangs on no parameter of the student"):
        results(student, leaves, schedule, direction)
