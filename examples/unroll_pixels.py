"""Trajectory matching of pixels with `speedk.unroll` alone: one learned image a class, on scikit-learn's 8x8 digits.

The synthetic images are trained so that a student that trains on them for STEPS steps ends where an expert that trains
on the real images ends. Student and data are plain PyTorch: put your own here. python examples/unroll_pixels.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector

import speedk

EPOCHS, AHEAD, STEPS = 12, 2, 10  # epochs of an expert, and those that STEPS steps on the synthetic images stand for


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2),
                         nn.Flatten(), nn.Linear(128, 10))


def train(student: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float, batch: int):
    optimiser, path = torch.optim.SGD(student.parameters(), lr), [parameters_to_vector(student.parameters()).detach()]
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(student(images[index]), labels[index]).backward()
            optimiser.step()
        path.append(parameters_to_vector(student.parameters()).detach())
    return path  # the parameters before the first epoch and after each


def main(experts: int = 5, iterations: int = 300) -> list[float]:
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    pixels = ((pixels - pixels.mean()) / pixels.std()).float().view(-1, 1, 8, 8)
    paths = [train(network(seed), pixels[:1400], labels[:1400], EPOCHS, 0.1, 100) for seed in range(experts)]
    first, classes = torch.stack([pixels[labels == digit][0] for digit in range(10)]), torch.arange(10)
    images, lr = first.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)  # what is learned
    optimiser, student = torch.optim.Adam([{"params": [images], "lr": 0.05}, {"params": [lr], "lr": 0.005}]), network(0)
    for iteration in range(iterations):
        path, start = paths[torch.randint(experts, ())], int(torch.randint(EPOCHS - AHEAD, ()))
        theta, target = path[start], path[start + AHEAD]
        end = speedk.unroll(student, theta, images, classes, [classes] * STEPS, lr, momentum=0)
        loss = (end - target).square().sum() / (theta - target).square().sum()
        images.grad, lr.grad = torch.autograd.grad(loss, (images, lr))
        optimiser.step()
        lr.data.clamp_(min=0.001)
        print(f"\riteration {iteration + 1}: distance {loss:.3f}, rate {lr:.3f}", end="", flush=True)
    accuracies = []
    for ten in (first, images.detach()):  # of a fresh network, trained on ten images
        train(fresh := network(99), ten, classes, 200, lr.item(), 10)
        accuracies.append((fresh(pixels[1400:]).argmax(1) == labels[1400:]).float().mean().item())
    print("\naccuracy from ten real images {:.3f}, from ten learned ones {:.3f}".format(*accuracies))
    return accuracies


if __name__ == "__main__":
    main()
