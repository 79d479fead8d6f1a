"""speedk.unroll: against a plain unroll with create_graph=True, in every memory mode."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from toys import DEVICES
from unrolled import GEOMETRY, STUDENTS, gradients, plainly, problem, relative

import speedk
from speedk import networks, seeds
from speedk.augment import dsa
from speedk.distillation.unroll import dsa_steps
from speedk.training import repeatable


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("name", STUDENTS)
def test_exact(name, momentum, device):
    student = STUDENTS[name]()
    # A GPU's float32 is tf32 in places.
    for dtype, allowed in ((torch.float64, 1e-9), *([(torch.float32, 5e-4)] if device == "cpu" else [])):
        theta, images, labels, schedule, lr, direction = problem(student, dtype, device=device)
        leaves = (theta, images, labels, lr)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want_theta = plainly(student, *exact[:3], schedule, exact[3], momentum)
        want = gradients(want_theta, direction.double(), exact)
        got_theta = speedk.unroll(student, theta, images, labels, schedule, lr, momentum)
        got = gradients(got_theta, direction, leaves)
        assert got_theta.dtype == dtype and relative(got_theta.double(), want_theta) < allowed
        for of, a, b in zip(("theta", "images", "labels", "lr"), got, want, strict=True):
            assert b.abs().max() > 0
            assert relative(a.double(), b) < allowed, of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*STUDENTS, "dropout", "group norm"])
def test_memory_modes_give_the_same_bits(name, device, monkeypatch):
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 2 * 8 * 8)  # two pieces a batch
    others = {
        "dropout": lambda: networks.fresh("vit", GEOMETRY, 0, dim=8, depth=1, heads=1, hidden=8, dropout=0.3),
        "group norm": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
                                            nn.Linear(144, 3)),
    }
    torch.manual_seed(0)
    student = {**STUDENTS, **others}[name]()
    theta, images, labels, schedule, lr, direction = problem(student, torch.float32, steps=12, device=device)
    results = []
    for memory in ("constant", "full", 20_000, 60_000):
        torch.manual_seed(5)
        theta_T = speedk.unroll(student, theta, images, labels, schedule, lr, augment=dsa_steps(3), memory=memory)
        results.append([theta_T.detach(), *gradients(theta_T, direction, (theta, images, labels, lr))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", dsa.ALL)
def test_through_augmentation(op):
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, direction = problem(student, soft=False)

    def augment(batch, step):
        return dsa.apply(batch, dsa.draw(len(batch), 8, seeds.generator(3, "dsa", step), ops=[op]))

    # Images alone: torch's grid_sample cannot be differentiated twice, so the plain unroll does it by hand, once.
    batches = [augment(images, step) if len(images) == len(index) else augment(images[index], step)
               for step, index in enumerate(schedule)]
    joined = torch.cat([b.detach() for b in batches]).requires_grad_()
    starts = [sum(len(i) for i in schedule[:t]) for t in range(len(schedule))]
    at = [torch.arange(start, start + len(index)) for start, index in zip(starts, schedule, strict=True)]
    again = torch.cat([labels[index] for index in schedule])
    want_theta = plainly(student, theta, joined, again, at, lr, 0.9)
    d_joined, want_lr = gradients(want_theta, direction, (joined, lr))
    want, = torch.autograd.grad(torch.cat(batches), images, d_joined)
    got_theta = speedk.unroll(student, theta, images, labels, schedule, lr, augment=dsa_steps(3, ops=[op]))
    got, got_lr = gradients(got_theta, direction, (images, lr))
    assert relative(got_theta, want_theta) < 1e-9
    assert relative(got, want) < 1e-9 and relative(got_lr, want_lr) < 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_replayed(device):
    """The derivative of what ran, mask and all, by differences."""
    student = networks.fresh("vit", GEOMETRY, 0, dim=8, depth=1, heads=1, hidden=8, dropout=0.3)
    theta, images, labels, schedule, lr, direction = problem(student, soft=False, device=device)
    noise = torch.randn_like(images)

    def augment(x, step):
        return x + torch.rand(1, device=device) + torch.rand(1).to(device)

    def result(images):
        torch.manual_seed(2)
        return speedk.unroll(student, theta, images, labels, schedule, lr, augment=augment)

    got, = gradients(result(images), direction, (images,))
    with torch.no_grad():
        ahead, behind = (result(images + h * noise) @ direction for h in (1e-5, -1e-5))
        assert not torch.equal(result(images), speedk.unroll(student, theta, images, labels, schedule, lr))
    torch.testing.assert_close((got * noise).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=0)


def test_each_step_draws_its_own_and_the_same_on_the_way_back():
    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout, self.masks = nn.Linear(64, 3), nn.Dropout(0.5), []

        def forward(self, images):
            self.masks.append(self.dropout(torch.ones(64)))
            return self.linear(images.flatten(1) * self.masks[-1])

    def augment(images, step):
        moved = dsa_steps(3)(images, step)
        shifts.append((step, torch.rand(8), moved.detach()))
        return moved + shifts[-1][1]

    student, shifts = Noting(), []
    theta, images, labels, _, lr, direction = problem(student, torch.float32)
    theta_T = speedk.unroll(student, theta, images, labels, [torch.arange(4)] * 6, lr, augment=augment)
    drawn = [student.masks[:], *map(list, zip(*shifts, strict=True))]
    assert drawn[1] == list(range(6))
    for each in (drawn[0], *drawn[2:]):  # of one batch, so nothing but what is drawn makes them differ
        assert len(each) == 6 and not any(torch.equal(a, b) for i, a in enumerate(each) for b in each[:i])
    gradients(theta_T, direction, (images,))
    back = [student.masks[6:], *map(list, zip(*shifts[6:], strict=True))]
    assert back[1] == drawn[1][::-1]
    for there, again in zip((drawn[0], *drawn[2:]), (back[0], *back[2:]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, again[::-1], strict=True))


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand(), lambda: np.random.normal()],
                         ids=["random", "numpy", "numpy normal"])
def test_what_python_and_numpy_draw_is_replayed(draw):
    """In an augmentation and in a loss; and the generators are left as they were."""
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    leaves, drawn, kept = (theta, images, labels, lr), [], []

    def augment(batch, step):
        drawn.append(draw())
        return batch * (1 + drawn[-1])

    def loss(logits, labels):
        kept.append(draw())
        return (1 + kept[-1]) * torch.nn.functional.cross_entropy(logits, labels)

    results = []
    for memory in ("full", "constant"):
        torch.manual_seed(5)
        before = random.getstate(), np.random.get_state()[1:]
        end = speedk.unroll(student, *leaves[:3], schedule, lr, augment=augment, loss=loss, memory=memory)
        results.append(gradients(end, direction, leaves))
        after = random.getstate(), np.random.get_state()[1:]
        assert after[0] == before[0] and all(np.array_equal(a, b) for a, b in zip(after[1], before[1], strict=True))
    assert all(map(torch.equal, *results))
    for values in (drawn, kept):
        assert len(set(values[:6])) == 6 and values[:6] == values[6:12] == values[:11:-1]


@pytest.mark.parametrize("memory", ["constant", 20_000, "full"])
@pytest.mark.parametrize("now,later", [(True, False), (False, True)])
def test_the_mode_of_the_start_counts(memory, now, later):
    """A student put in another mode before the backward pass: dropout, and a batch norm whose statistics are fixed."""
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.ReLU(), nn.Dropout(0.5),
                            nn.Flatten(), nn.Linear(144, 3))
    theta, images, labels, schedule, lr, direction = problem(student, torch.float32)
    leaves, results = (theta, images, labels, lr), []
    for changed in (False, True):
        student.train(now)[1].eval()
        torch.manual_seed(5)
        theta_T = speedk.unroll(student, *leaves[:3], schedule, lr, memory=memory)
        if changed:
            student.train(later)[4].train(now)  # the last dropout differs from the rest
        modes = [module.training for module in student.modules()]
        results.append(gradients(theta_T, direction, leaves))
        assert modes == [module.training for module in student.modules()]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool(student[1].num_batches_tracked == 0)


def test_autocast_is_that_of_the_call():
    """A step that is built again is the one that ran, augmentation included, whatever the backward pass is set to."""
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student, torch.float32, soft=False)
    leaves, seen = (theta, images, lr), set()
    student.register_forward_hook(lambda module, given, logits: seen.add(logits.dtype))
    mixed = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))

    def run(memory, inside, back=None):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            end = speedk.unroll(student, theta, images, labels, schedule, lr, memory=memory,
                                augment=lambda images, step: (images @ mixed).float())
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside if back is None else back):
            found = [end.detach(), *gradients(end, direction, leaves)]
        assert seen == {torch.bfloat16 if inside else torch.float32}
        return found

    plain, rounded = run("constant", False), run("constant", True)
    assert all(map(torch.equal, rounded, run("full", True))) and all(map(torch.equal, plain, run("full", False)))
    assert all(map(torch.equal, rounded, run("full", True, back=True)))
    assert all(map(torch.equal, plain, run("full", False, back=False)))
    for a, b in zip(rounded, plain, strict=True):
        assert a.dtype == torch.float32 and 0 < relative(a, b) < 0.1


def test_a_loss_of_ones_own():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    loss = lambda logits, labels: (logits - labels).square().mean()  # noqa: E731
    leaves = (theta, images, labels, lr)
    want = gradients(plainly(student, *leaves[:3], schedule, lr, 0.5, loss=loss), direction, leaves)
    got = gradients(speedk.unroll(student, *leaves[:3], schedule, lr, 0.5, loss=loss), direction, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_what_is_frozen_keeps_its_value_and_its_gradient(momentum, monkeypatch):
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 2 * 8 * 8)
    student = STUDENTS["convnet"]()
    first, *_, last = student.parameters()
    theta, images, labels, schedule, lr, direction = problem(student)
    leaves, results = (theta, images, labels, lr), []
    for parameter in (first, last):
        parameter.requires_grad_(False)
    want_theta = plainly(student, *leaves[:3], schedule, lr, momentum)
    want = gradients(want_theta, direction, leaves)
    for memory in ("constant", "full"):
        first.requires_grad_(False)
        got_theta = speedk.unroll(student, *leaves[:3], schedule, lr, momentum, memory=memory)
        first.requires_grad_()  # it was frozen when the steps were taken
        results.append([got_theta.detach(), *gradients(got_theta, direction, leaves)])
    for place in (slice(first.numel()), slice(-last.numel(), None)):
        assert torch.equal(results[0][0][place], theta[place])
        assert not torch.equal(results[0][1][place], direction[place])  # later gradients depend on it
    for got, exact in zip(results[0], [want_theta, *want], strict=True):
        assert relative(got, exact) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 8 * 8)
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, direction = problem(student, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            theta_T = speedk.unroll(student, theta, images, labels, schedule, lr)
            results.append([theta_T.detach(), *gradients(theta_T, direction, (theta, images, labels, lr))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_what_is_asked_for():
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    full = gradients(speedk.unroll(student, theta, images, labels, schedule, lr), direction, (theta, images, lr))
    for position, leaf in enumerate((theta, images, lr)):
        with_one = [t if t is leaf else t.detach() for t in (theta, images, labels, lr)]
        theta_T = speedk.unroll(student, *with_one[:3], schedule, with_one[3])
        assert torch.equal(gradients(theta_T, direction, (leaf,))[0], full[position])
    with torch.no_grad():
        assert not speedk.unroll(student, theta, images, labels, schedule, lr).requires_grad
    assert torch.equal(speedk.unroll(student, theta, images, labels, [], lr), theta)


@pytest.mark.parametrize("memory", ["constant", "full"])
def test_backward_twice(memory):
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    theta_T = speedk.unroll(student, theta, images, labels, schedule, lr, memory=memory)
    first, = torch.autograd.grad(theta_T, images, direction, retain_graph=True)
    assert torch.equal(torch.autograd.grad(theta_T, images, direction)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(theta_T, images, direction)


def test_second_derivatives_are_refused():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    theta_T = speedk.unroll(student, theta, images, labels, schedule, lr)
    for leaf in (theta, images, lr):
        d_leaf, = torch.autograd.grad(theta_T, leaf, direction, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once, not twice"):
            d_leaf.sum().backward()
    d_lr, = torch.autograd.grad(speedk.unroll(student, theta.detach(), images.detach(), labels.detach(), schedule, lr),
                                lr, direction, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        d_lr.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_leaves_the_student_and_the_random_state_alone(device):
    student = STUDENTS["convnet"]().to(device)
    before = [p.detach().clone() for p in student.parameters()]
    theta, images, labels, schedule, lr, direction = problem(student, device=device)
    torch.manual_seed(4)
    torch.randint(2**62, ())  # the one draw
    state = torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state() if device == "cuda" else None
    torch.manual_seed(4)
    gradients(speedk.unroll(student, theta, images, labels, schedule, lr, augment=dsa_steps(0)), direction, (images,))
    assert torch.equal(torch.get_rng_state(), state)
    assert of_gpu is None or torch.equal(torch.cuda.get_rng_state(), of_gpu)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
    assert all(p.grad is None for p in student.parameters())


def test_results_that_are_held_hold_no_threads(monkeypatch):
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 8 * 8)
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, _ = problem(student)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        held = [speedk.unroll(student, theta, images, labels, schedule, lr)]
        threads = threading.active_count()
        held += [speedk.unroll(student, theta, images, labels, schedule, lr) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert threading.active_count() == threads and all(torch.equal(one, held[0]) for one in held)


def test_cudnn_is_repeatable_for_the_time_being():
    before = torch.backends.cudnn.deterministic
    with repeatable(torch.device("cpu")):
        assert torch.backends.cudnn.deterministic == before
    with pytest.raises(KeyError), repeatable(torch.device("cuda")):
        assert torch.backends.cudnn.deterministic
        raise KeyError
    assert torch.backends.cudnn.deterministic == before
