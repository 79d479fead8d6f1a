"""Recorded steps, and what to hold them to.

On a GPU the recordings are CUDA graphs. On the CPU `Rerun` stands in for them: it runs what was recorded once more and,
as graphs in one pool of memory do, overwrites what the others have left.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from unrolled import gradients, problem

import speedk
from speedk.distillation.unroll import replay


class Rerun:
    aside = staticmethod(contextlib.nullcontext)

    def __init__(self, device):
        self.made = []

    def follow(self):
        pass

    def record(self, function):
        found = function()
        self.made.append(found)
        self.spoil()

        def replay():
            values = function()
            self.spoil()
            for t, value in zip(found, values, strict=True):
                t.copy_(value)

        return replay, found

    def spoil(self):
        for t in (t for found in self.made for t in found):
            t.fill_(float("nan") if t.is_floating_point() else 255)


@contextlib.contextmanager
def replaying(device, monkeypatch):
    """Steps on a device are recorded, by the stand-in where it records nothing itself."""
    replay.forget()
    monkeypatch.delenv("SPEEDK_CUDA_GRAPHS", raising=False)
    monkeypatch.setattr("speedk.distillation.unroll.graph.GRAPH_PIECE_PIXELS", 1 << 30)
    if device == "cpu":
        monkeypatch.setattr(replay, "recorder_of", lambda device: Rerun)
    yield device
    replay.forget()


@contextlib.contextmanager
def eagerly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "recorder_of", lambda device: None)
        yield


def recorded(student):
    return [r for kept in replay._of_students.get(student, {}).values() for r in kept._found.values()]


def results(student, leaves, schedule, direction, **how):
    torch.manual_seed(5)
    theta, images, labels, lr = leaves
    theta_T = speedk.unroll(student, theta, images, labels, schedule, lr, **how)
    learned = [t for t in leaves if t.requires_grad]
    return [theta_T.detach(), *(gradients(theta_T, direction, learned) if theta_T.requires_grad else ())]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def given(student, device, soft=True, steps=8, **sizes):
    theta, images, labels, schedule, lr, direction = problem(student, torch.float32, soft, steps=steps, device=device,
                                                             **sizes)
    return (theta, images, labels, lr), schedule, direction
