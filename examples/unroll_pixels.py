"""Trajectory matching of pixels with `speedk.unroll` alone: one learned image a class, on scikit-learn's 8x8 digits.

The synthetic images are trained so that a student that trains on them for STEPS steps ends where an expert that trains
on the real images ends. Student and data are plain PyTorch: put your own here. python examples/unroll_pixels.py
"""

from __future__ import annotations

import random

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import speedk

EXPERTS, EPOCHS, AHEAD = 5, 12, 2  # networks, epochs of each, epochs that the synthetic images stand for
STEPS, ITERATIONS = 10, 300


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Flatten(), nn.Linear(128, 10))


def train(student: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float, batch: int):
    """Plain SGD; the parameters as one vector before the first and after each epoch."""
    optimiser, path = torch.optim.SGD(student.parameters(), lr), [parameters_to_vector(student.parameters()).detach()]
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            cross_entropy(student(images[index]), labels[index]).backward()
            optimiser.step()
        path.append(parameters_to_vector(student.parameters()).detach())
    return path


def main(experts: int = EXPERTS, iterations: int = ITERATIONS) -> tuple[float, float]:
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    pixels = ((pixels - pixels.mean()) / pixels.std()).float().view(-1, 1, 8, 8)
    real, real_labels, test, test_labels = pixels[:1400], labels[:1400], pixels[1400:], labels[1400:]
    paths = [train(network(seed), real, real_labels, EPOCHS, 0.1, 100) for seed in range(experts)]

    first = torch.stack([real[real_labels == digit][0] for digit in range(10)])
    images, classes = first.clone().requires_grad_(), torch.arange(10)
    lr = torch.tensor(0.1, requires_grad=True)  # the student's rate is learned, too
    optimiser = torch.optim.Adam([{"params": [images], "lr": 0.05}, {"params": [lr], "lr": 0.005}])
    student, choose = network(0), random.Random(0)
    for iteration in range(iterations):
        path, start = choose.choice(paths), choose.randrange(EPOCHS - AHEAD)
        theta, target = path[start], path[start + AHEAD]
        end = speedk.unroll(student, theta, images, classes, [classes] * STEPS, lr, momentum=0)
        loss = (end - target).square().sum() / (theta - target).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        lr.data.clamp_(min=0.001)
        if iteration % 50 == 0:
            print(f"iteration {iteration:>4}: distance {loss.item():.3f}, rate {lr.item():.3f}", flush=True)

    def accuracy(images: torch.Tensor) -> float:
        """Of a fresh network, trained on ten images."""
        train(fresh := network(99), images.detach(), classes, 200, lr.item(), 10)
        return (fresh(test).argmax(1) == test_labels).float().mean().item()

    found = accuracy(first), accuracy(images)
    print(f"accuracy from ten real images {found[0]:.3f}, from ten learned ones {found[1]:.3f}")
    return found


if __name__ == "__main__":
    main()
