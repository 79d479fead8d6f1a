"""What `speedk.unroll` may be given, and what it refuses in a line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from unrolled import STUDENTS, gradients, plainly, problem

import speedk
from speedk.errors import ConfigError


def test_strided_theta():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, _ = problem(student)
    every_second = torch.stack([theta, theta], 1)[:, 0]
    got = speedk.unroll(student, every_second, images, labels, schedule, lr)
    assert torch.equal(got, speedk.unroll(student, theta, images, labels, schedule, lr))
    got.sum().backward()  # a gradient of stride 0
    assert theta.grad.abs().max() > 0


def test_buffers_that_change_are_refused():
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).double()
    theta, images, labels, schedule, lr, direction = problem(student)
    before = student[1].running_mean.clone()
    with pytest.raises(ConfigError, match="1.running_mean, 1.running_var, 1.num_batches_tracked"):
        speedk.unroll(student, theta, images, labels, schedule, lr)
    assert torch.equal(student[1].running_mean, before)
    student.eval()
    leaves = (theta, images, labels, lr)
    got = gradients(speedk.unroll(student, theta, images, labels, schedule, lr), direction, leaves)
    want = gradients(plainly(student, theta, images, labels, schedule, lr, 0.9), direction, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_refusals():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, _ = problem(student)
    frozen = STUDENTS["mlp"]().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"has no parameter that requires a gradient.*say student.requires_grad_\(\)"):
        speedk.unroll(frozen, theta, images, labels, schedule, lr)
    with pytest.raises(ConfigError, match="has no parameter that requires a gradient"):
        speedk.unroll(nn.Flatten(), theta[:0], images, labels, schedule, lr)
    for message, arguments in {
        "the student has": (theta[1:], images, labels, schedule, lr),
        "images must be": (theta, images[0], labels[:1], schedule, lr),
        r"labels must be int64 \[10\]": (theta, images, labels[1:], schedule, lr),
        r"schedule\[0\] points outside": (theta, images, labels, [torch.tensor([10])], lr),
        r"schedule\[0\] must be int64": (theta, images, labels, [torch.tensor([1.0])], lr),
        "lr must be a scalar": (theta, images, labels, schedule, lr[None]),
        "momentum=1": (theta, images, labels, schedule, lr, 1),
        "memory='some'": (theta, images, labels, schedule, lr, 0.9, None, None, "some"),
    }.items():
        with pytest.raises(ConfigError, match=message):
            speedk.unroll(student, *arguments)


def test_what_does_not_fit_is_said_in_a_line():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, _ = problem(student, soft=False)
    with torch.inference_mode():
        made_inside, rate_inside = images * 1, torch.tensor(0.1, dtype=torch.float64)
    for message, arguments in {
        r"labels must be int64 \[10\] .* got torch.int32": (theta, images, labels.int(), schedule, lr),
        "images are torch.float32.*make the floats one dtype": (theta, images.float(), labels, schedule, lr),
        "labels torch.float32: make the floats": (theta, images, F.one_hot(labels).float(), schedule, lr),
        "theta is on cpu, images on meta": (theta, images.to("meta"), labels, schedule, lr),
        "images was made in torch.inference_mode.*clone it": (theta, made_inside, labels, schedule, lr),
        r"schedule\[1\] must be int64 \[B\], or a sequence of ints, got str": (theta, images, labels, [[0], "ab"], lr),
        r"schedule\[0\] must be int64 \[B\] with B at least 1, got torch.int64 \(\)": (theta, images, labels, [3], lr),
        r"schedule\[0\] must be int64 \[B\] with B at least 1": (theta, images, labels, [[]], lr),
        "lr must be a real scalar tensor, or a number, got str": (theta, images, labels, schedule, "x"),
        "lr must be a real scalar tensor, or a number, got NoneType": (theta, images, labels, schedule, None),
        "lr must be a real scalar tensor, or a number, got complex": (theta, images, labels, schedule, 1j),
        "lr must be a real .* got one that is torch.complex64": (theta, images, labels, schedule, torch.tensor(0.1j)),
        "lr was made in torch.inference_mode.*clone it": (theta, images, labels, schedule, rate_inside),
        "momentum must be a number, got str": (theta, images, labels, schedule, lr, "0.9"),
        "momentum must be a number, got NoneType": (theta, images, labels, schedule, lr, None),
        "momentum must be a number, got Tensor": (theta, images, labels, schedule, lr, torch.tensor(0.9)),
        "labels must be a tensor, got list": (theta, images, labels.tolist(), schedule, lr),
        "images must be a tensor, got list": (theta, images.tolist(), labels, schedule, lr),
        "theta must be a tensor, got NoneType": (None, images, labels, schedule, lr),
        "schedule must be index tensors, one a step, got int": (theta, images, labels, 5, lr),
        "schedule must be index tensors, one a step, got Tensor": (theta, images, labels, torch.tensor(5), lr),
        r"schedule\[0\] points outside the 10 images": (theta, images, labels, [[0, -1]], lr),
        "labels are of 4 classes but the student gives 3 logits": (
            theta, images, torch.ones(10, 4, dtype=torch.float64) / 4, schedule, lr),
        "augment must give a batch of 4 images, floating point, got NoneType": (
            theta, images, labels, schedule, lr, 0.9, lambda images, step: None),
        r"augment must give a batch of 4 images, floating point, got torch.float64 \(3, 1, 8, 8\)": (
            theta, images, labels, schedule, lr, 0.9, lambda images, step: images[1:]),
        r"augment must give a batch of 4 images, floating point, got torch.int64": (
            theta, images, labels, schedule, lr, 0.9, lambda images, step: images.long()),
        "what augment gives does not hang on those it was given": (
            theta, images, labels, schedule, lr, 0.9, lambda images, step: images.detach() * 2),
        r"loss must give a scalar tensor, got torch.float64 \(4,\): take the mean over the batch": (
            theta, images, labels, schedule, lr, 0.9, None, lambda *both: F.cross_entropy(*both, reduction="none")),
        "loss must give a scalar tensor, got float": (
            theta, images, labels, schedule, lr, 0.9, None, lambda *both: F.cross_entropy(*both).item()),
        "the loss hangs on no parameter of the student: compute it from the logits": (
            theta, images, labels, schedule, lr, 0.9, None, lambda logits, labels: (logits.argmax(1) == labels).sum()),
        "memory=True is not 'constant', 'full' or a number": (theta, images, labels, schedule, lr, 0, None, None, True),
        "memory=nan is not": (theta, images, labels, schedule, lr, 0, None, None, float("nan")),
    }.items():
        with pytest.raises(ConfigError, match=message) as caught:
            speedk.unroll(student, *arguments)
        assert "\n" not in str(caught.value)
    with torch.inference_mode(), pytest.raises(ConfigError, match="torch.inference_mode forbids: take torch.no_grad"):
        speedk.unroll(student, theta, images, labels, schedule, lr)
    with pytest.raises(ConfigError, match="student must be a torch.nn.Module, got function"):
        speedk.unroll(lambda images: images, theta, images, labels, schedule, lr)


def test_images_that_are_not_learned_may_be_augmented_without_a_graph():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    ends = [speedk.unroll(student, theta, images.detach(), labels, schedule, lr, augment=augment)
            for augment in (lambda images, step: images.detach() * 2, lambda images, step: images * 2)]
    assert all(map(torch.equal, *(gradients(end, direction, (theta, lr)) for end in ends)))


def test_transforms_and_forward_mode_are_refused_in_a_line():
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, _ = problem(student, soft=False)

    def end(images):
        return speedk.unroll(student, theta, images, labels, schedule, lr)

    for transformed in (torch.func.grad(lambda images: end(images).sum()), lambda images: torch.func.vjp(end, images),
                        lambda images: torch.func.jvp(end, (images,), (images,)), torch.func.jacrev(end)):
        with pytest.raises(ConfigError, match="inside a transform of torch.func .*: take torch.autograd.grad of what"):
            transformed(images)
    with pytest.raises(ConfigError, match="inside a transform of torch.func"):
        torch.vmap(end)(images[None])
    with forward_ad.dual_level(), pytest.raises(ConfigError, match="images has a tangent of forward-mode AD"):
        end(forward_ad.make_dual(images, images.detach()))


class Apart(nn.Module):
    """A student whose parameter is used by `how` alone; the images' path to the loss is there in any case."""

    per_sample = True

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(64, 3), how

    def forward(self, images):
        return self.how(self.linear, images.flatten(1))


@pytest.mark.parametrize("how", [
    lambda linear, x: checkpoint(linear, x, use_reentrant=True),
    lambda linear, x: F.linear(x, linear.weight.data, linear.bias.data),
    lambda linear, x: x[:, :3] * 2,
], ids=["reentrant checkpoint", "data", "unused"])
def test_a_loss_that_hangs_on_the_images_alone_is_refused(how):
    student = Apart(how)
    theta, images, labels, schedule, lr, _ = problem(student)
    with pytest.raises(ConfigError, match="the loss hangs on no parameter of the student"):
        speedk.unroll(student, theta, images, labels, schedule, lr)


def test_a_parameter_beside_the_path_has_a_gradient_of_zero():
    student = Apart(lambda linear, x: x @ linear.weight.T)
    theta, images, labels, schedule, lr, direction = problem(student)
    end = speedk.unroll(student, theta, images, labels, schedule, lr)
    assert torch.equal(end[-3:], theta[-3:]) and not torch.equal(end, theta)
    assert torch.equal(gradients(end, direction, (theta,))[0][-3:], direction[-3:])


@pytest.mark.parametrize(("answer", "got"), [
    (lambda logits: {"logits": logits}, "dict"),
    (lambda logits: logits.sum(), r"torch.float64 \(\)"),
    (lambda logits: logits[0], r"torch.float64 \(3,\)"),
    (lambda logits: logits[:2], r"torch.float64 \(2, 3\)"),
], ids=["dict", "scalar", "vector", "short"])
def test_an_answer_that_is_no_logits_needs_a_loss_of_ones_own(answer, got):
    student = Apart(lambda linear, x: answer(linear(x)))
    theta, images, labels, schedule, lr, direction = problem(student, soft=False)
    with pytest.raises(ConfigError, match=rf"the student must give logits \[B, classes\], B = 4 here, got {got}"):
        speedk.unroll(student, theta, images, labels, schedule, lr)

    def loss(given, labels):
        return (given["logits"] if isinstance(given, dict) else given).square().sum()

    leaves = (theta, images, lr)
    want = gradients(plainly(student, theta, images, labels, schedule, lr, 0.9, loss=loss), direction, leaves)
    got = gradients(speedk.unroll(student, theta, images, labels, schedule, lr, loss=loss), direction, leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("label", "message"), [
    (-100, "there is a label -100: labels are 0 to classes - 1"),  # cross entropy leaves it out, pieces would not
    (3, "there is a label 3 but the student gives 3 logits: labels are 0 to 2"),
])
def test_labels_of_no_class_are_refused(label, message, monkeypatch):
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 8 * 8)
    student = STUDENTS["convnet"]()
    theta, images, labels, schedule, lr, direction = problem(student, soft=False)
    labels[1] = label
    with pytest.raises(ConfigError, match=message):
        speedk.unroll(student, theta, images, labels, schedule, lr)

    def loss(logits, labels):  # one's own may take them
        return F.cross_entropy(logits, labels, ignore_index=label)

    want = gradients(plainly(student, theta, images, labels, schedule, lr, 0.9, loss=loss), direction, (images, lr))
    got = gradients(speedk.unroll(student, theta, images, labels, schedule, lr, loss=loss), direction, (images, lr))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_schedule_may_be_a_generator_of_lists_or_one_tensor():
    student = STUDENTS["mlp"]()
    theta, images, labels, _, lr, _ = problem(student)
    table = torch.tensor([[1, 2, 3], [0, 1, 9]])
    want = speedk.unroll(student, theta, images, labels, list(table), lr)
    assert not torch.equal(want, theta)
    for schedule in ((row for row in table), table.tolist(), table):
        assert torch.equal(speedk.unroll(student, theta, images, labels, schedule, lr), want)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_a_schedule_that_is_changed_in_place_is_the_one_that_ran(kind):
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, direction = problem(student)
    if kind is np.ndarray:
        schedule = [index.numpy() for index in schedule]
    leaves = (theta, images, labels, lr)
    want = gradients(speedk.unroll(student, *leaves[:3], schedule, lr), direction, leaves)
    end = speedk.unroll(student, *leaves[:3], schedule, lr)
    for index in schedule:
        index[:] = 0
    assert all(map(torch.equal, gradients(end, direction, leaves), want))


@pytest.mark.parametrize("number", [np.int64(20_000), np.float32(2e4), 20_000])
def test_memory_may_be_any_number(number):
    student = STUDENTS["mlp"]()
    theta, images, labels, schedule, lr, _ = problem(student)
    want = speedk.unroll(student, theta, images, labels, schedule, lr)
    assert torch.equal(speedk.unroll(student, theta, images, labels, schedule, lr, memory=number), want)


def test_a_constant_nan_in_a_buffer_is_no_change():
    student = STUDENTS["mlp"]()
    student.register_buffer("unknown", torch.tensor([float("nan"), 1.0]))
    theta, images, labels, schedule, lr, _ = problem(student)
    assert bool(speedk.unroll(student, theta, images, labels, schedule, lr).isfinite().all())
