"""Small students, something to unroll, and an unroll in plain PyTorch to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from speedk import networks
from speedk.geometry import Geometry

GEOMETRY = Geometry(classes=3, channels=1, resolution=8)
STUDENTS = {
    "convnet": lambda: networks.fresh("convnet", GEOMETRY, 0, depth=2, width=4),
    "mlp": lambda: networks.fresh("mlp", GEOMETRY, 0, width=6),
    "vit": lambda: networks.fresh("vit", GEOMETRY, 0, dim=8, depth=1, heads=1, hidden=8, dropout=0),
}


def problem(student, dtype=torch.float64, soft=True, count=10, steps=6, batch=4, device="cpu"):
    """theta, images, labels, lr as leaves, a schedule with repeats and a short batch, and a direction for theta_T; the
    student goes to their device."""
    g = torch.Generator().manual_seed(1)
    geometry = GEOMETRY
    theta = torch.cat([p.detach().flatten() for p in student.to(device).parameters()])
    images = torch.randn(count, geometry.channels, geometry.resolution, geometry.resolution, generator=g)
    labels = torch.randint(geometry.classes, (count,), generator=g)
    if soft:
        labels = torch.randn(count, geometry.classes, generator=g).softmax(1).to(device, dtype).requires_grad_()
    schedule = [torch.randint(count, (batch,), generator=g) for _ in range(steps - 1)] + [torch.tensor([1, 1, 7])]
    leaves = [t.to(device, dtype).requires_grad_() for t in (theta, images)]
    lr = torch.tensor(0.05, dtype=dtype, device=device, requires_grad=True)
    direction = torch.randn(theta.shape, generator=g, dtype=torch.float64).to(device, dtype)
    return *leaves, labels.to(device), schedule, lr, direction


def plainly(student, theta, images, labels, schedule, lr, momentum, augment=None, loss=F.cross_entropy):
    """What speedk.unroll promises, said in the fewest words."""
    shapes = {name: p.shape for name, p in student.named_parameters()}
    m = torch.zeros_like(theta)
    for step, index in enumerate(schedule):
        values = theta.split([s.numel() for s in shapes.values()])
        parameters = {name: v.view(s) for (name, s), v in zip(shapes.items(), values, strict=True)}
        batch = images[index] if augment is None else augment(images[index], step)
        with sdpa_kernel(SDPBackend.MATH):
            g, = torch.autograd.grad(loss(functional_call(student, parameters, (batch,)), labels[index]), theta,
                                     create_graph=True)
        g = g * torch.cat([torch.full_like(p.detach().flatten(), p.requires_grad) for p in student.parameters()])
        m = momentum * m + (1 - momentum) * g
        theta = theta - lr * m
    return theta


def gradients(theta_T, direction, leaves):
    return torch.autograd.grad((theta_T * direction).sum(), leaves)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()
