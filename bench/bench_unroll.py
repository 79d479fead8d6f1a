"""`speedk.unroll` against the straightforward full unroll: forward, and back to images and rate.

The peer is what one would write: stock modules (the group norm is the faster of PyTorch's two instance norms here) and
`create_graph=True`. The yardsticks are the ConvNet's convolutions alone, forward, backward and double backward, and
`constant` with its convolutions in bf16.
On a GPU both sides run in tf32; that they agree is seen in full float32, as rounding grows from step to step.
`pytest bench/ --long` runs all shapes and numbers of steps, on 4 CPU cores for an hour; without it those of the floors.
Where the peer cannot hold 60 steps it is compared at 10, and the report says so.
"""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from measuring import CUDA, DEVICE, agree, least_peak
from torch import nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, relu

import speedk
from speedk import memory, networks
from speedk.geometry import Geometry

WIDTH = 128


@dataclass(frozen=True)
class Shape:
    name: str
    images: int
    batch: int
    side: int
    depth: int


SHAPES = [Shape("cifar10-ipc1", 170, 64, 32, 3), Shape("cifar10-ipc10", 1240, 128, 32, 3),
          Shape("cifar10-batch256", 1240, 256, 32, 3), Shape("imagenet-ipc1", 150, 32, 128, 5)]  # fmt: skip
SHORT = [("cifar10-ipc1", 20), ("cifar10-ipc1", 60), ("cifar10-batch256", 20), ("imagenet-ipc1", 20)] if CUDA else [
    ("cifar10-ipc1", 5)]  # fmt: skip


class Plain(nn.Module):
    """The ConvNet of stock modules, its parameters in the order of ours."""

    def __init__(self, shape: Shape):
        super().__init__()
        channels = [3] + [WIDTH] * shape.depth
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.GroupNorm(WIDTH, WIDTH) for _ in range(shape.depth))
        self.classifier = nn.Linear(WIDTH * (shape.side >> shape.depth) ** 2, 10)

    def forward(self, x):
        for convolution, norm in zip(self.convolutions, self.norms):
            x = avg_pool2d(relu(norm(convolution(x))), 2)
        return self.classifier(x.flatten(1))


def plainly(student, theta, images, labels, schedule, lr, momentum=0.9):
    shapes = {name: p.shape for name, p in student.named_parameters()}
    m = torch.zeros_like(theta)
    for index in schedule:
        values = theta.split([s.numel() for s in shapes.values()])
        parameters = {name: v.view(s) for (name, s), v in zip(shapes.items(), values)}
        loss = cross_entropy(functional_call(student, parameters, (images[index],)), labels[index])
        g, = torch.autograd.grad(loss, theta, create_graph=True)
        m = momentum * m + (1 - momentum) * g
        theta = theta - lr * m
    return theta


def convolutions(shape, steps):
    """One step's convolutions, `steps` times."""
    layers = []
    for layer in range(shape.depth):
        c_in, side = WIDTH if layer else 3, shape.side >> layer
        tensors = [torch.randn(s, device=DEVICE, requires_grad=True) for s in (
            (shape.batch, c_in, side, side), (WIDTH, c_in, 3, 3), (shape.batch, WIDTH, side, side))]
        layers.append(tensors)

    def run():
        for _ in range(steps):
            for x, weight, d_out in layers:
                # The first layer's input has a gradient in the second order alone.
                leaves = (x, weight) if x.shape[1] != 3 else (weight,)
                out = conv2d(x, weight, padding=1)
                first = torch.autograd.grad(out, leaves, d_out, create_graph=True)
                torch.autograd.grad((out, *first), (x, weight, d_out), [d_out, *(g.detach() for g in first)])

    return run


@pytest.mark.parametrize("steps", [5, 10, 20, 60])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def bench_unroll(contest, request, shape, steps):
    if (shape.name, steps) not in SHORT and not request.config.getoption("--long"):
        pytest.skip("takes minutes: run it with --long")
    student = networks.fresh("convnet", Geometry(10, 3, shape.side), 0, DEVICE, depth=shape.depth)
    plain = Plain(shape).to(DEVICE)
    theta = torch.cat([p.detach().flatten() for p in student.parameters()])
    images = torch.randn(shape.images, 3, shape.side, shape.side, device=DEVICE, requires_grad=True)
    labels = torch.randint(10, (shape.images,), device=DEVICE)
    lr = torch.tensor(0.01, device=DEVICE, requires_grad=True)
    order = torch.cat([torch.randperm(shape.images) for _ in range(1 + steps * shape.batch // shape.images)])
    schedule = list(order.to(DEVICE).split(shape.batch)[:steps])
    direction, start = torch.randn_like(theta), theta.clone().requires_grad_()

    def both(unroll, schedule=schedule):
        return lambda: torch.autograd.grad(unroll(schedule), (images, lr), direction)

    ways = {name: lambda schedule, m=name: speedk.unroll(student, theta, images, labels, schedule, lr, memory=m)
            for name in ("constant", "full")}  # fmt: skip
    eager = lambda schedule: plainly(plain, start, images, labels, schedule, lr)  # noqa: E731
    # A step's graph, from two steps against one: whether all of them fit.
    sizes = {name: (least_peak(both(way, schedule[:2])) or 0) - (least_peak(both(way, schedule[:1])) or 0)
             for name, way in (("full", ways["full"]), ("eager", eager))}  # fmt: skip
    free = 0.8 * memory.spare(torch.device(DEVICE))
    if steps == 10 and 60 * sizes["eager"] < free:
        pytest.skip("eager is compared at 60 steps, which fit")
    fits = {name: steps * size < free for name, size in sizes.items()}
    for name, fit in fits.items():
        if not fit:
            instead = ": compared at T=10" if name == "eager" and 10 * sizes[name] < free else ""
            contest.leave_out(f"unroll, {shape.name} T={steps}: {name}: {steps} steps of {sizes[name] / 1e6:.0f} MB do "
                              f"not fit {free / 1e9:.1f} GB{instead}")
    if CUDA:
        _agree_in_float32(ways, eager, both, schedule[:5])
    ours = {name: both(way) for name, way in ways.items() if fits.get(name, True)}
    rounded = networks.set_precision(copy.deepcopy(student), "convnet", "bf16")
    half = lambda schedule: speedk.unroll(rounded, theta, images, labels, schedule, lr)  # noqa: E731
    contest("unroll", f"{shape.name} T={steps}", ours, {"eager": both(eager)} if fits["eager"] else {}, memory=True,
            yardsticks={"constant, bf16": both(half), "convolutions alone": convolutions(shape, steps)},
            close=float("inf") if CUDA else 5e-4, apart=0.1, rounds=3 if steps == 5 else 2 if CUDA else 1,
            precision="tf32" if CUDA else "float32")


def _agree_in_float32(ways, eager, both, schedule) -> None:
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        want = both(eager, schedule)()
        for name, way in ways.items():
            agree(f"unroll: {name}", both(way, schedule)(), want, 5e-4, 0.1)
    finally:
        torch.backends.cudnn.allow_tf32 = before
