"""Training steps as one differentiable function, exact, in memory that does not grow with the steps' graphs.

Forward, only theta and its momentum are kept from step to step. Backward, one step at a time is built again, its
gradient differentiated along one direction, and its graph dropped: docs/math/unroll.md has the derivation.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from speedk import seeds
from speedk.augment import dsa
from speedk.distillation.unroll import replay
from speedk.distillation.unroll.graph import Augment, Loss, StepGraph, Training
from speedk.distillation.unroll.replay import Replayed
from speedk.errors import ConfigError
from speedk.ops import unroll_step, unroll_step_adjoint
from speedk.ordered import add_rows


def unroll(student: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, schedule: Iterable[Tensor], lr: Tensor,
           momentum: float = 0.9, augment: Augment | None = None, loss: Loss | None = None,
           memory: str | int = "constant") -> Tensor:
    """The parameters after training `student` from `theta`: one step for each batch of `schedule`.

    g = d loss / d theta at the batch; m = momentum m + (1 - momentum) g, from m = 0; theta = theta - lr m. Plain SGD
    for momentum 0. Differentiable once, in images, float labels, lr and theta, and exactly so: every path through the
    later steps counts, as in a full unroll with `create_graph=True`.

    student: any module; it is left as it is. Each of its modules trains in the mode it is in now, in the backward pass
    too: dropout acts where `training` is set.
    theta: [P] float, the `named_parameters()` flattened and laid end to end, in order. One that does not require a
    gradient keeps its value, and is differentiated in all the same.
    images: [N, C, H, W] float; labels: int64 [N], from 0 to classes - 1 unless `loss` is given, or float [N, classes].
    schedule: int64 index tensors [B_t] (or sequences of ints) into images, one a step; an index may come twice.
    lr: a scalar tensor (or a number). momentum: 0 up to, not including, 1.
    augment: `augment(images [B_t, C, H, W], step) -> images`, differentiable once. It is called again in the backward
    pass and must do the same then: it may depend on `step` and draw from the global generators of torch, numpy
    (`np.random.rand`) and Python's `random`, which are seeded for each step; `dsa_steps(seed)` makes one.
    loss: `loss(logits, labels)`, a scalar; cross entropy, mean over the batch, unless given.
    memory: "constant" builds each step's graph again in the backward pass; "full" keeps them all; a number of bytes
    keeps as many as fit in that. All give the same bits on the CPU, and on a GPU where no operation of the student, the
    loss or `augment` adds in an order of its own there (docs/unroll.md).

    Random numbers of dropout and augmentation follow from one draw of torch's default CPU generator; but for that, all
    global generators are afterwards as they were.
    A student that says `per_sample = True` (no operation of it mixes the samples of a batch, it draws no random numbers
    but in dropout modules, and it reads nothing that changes but its own attributes and PyTorch's settings) is trained
    faster, unless it has such dropout or a `loss` is given: on the CPU on pieces of the batch in threads, where the
    pieces do not depend on the number of threads, and on a GPU by CUDA graphs (docs/unroll.md).

    Returns theta_T [P]. Raises ConfigError where the arguments do not fit, and for a student whose buffers change as
    it trains (the running statistics of a batch norm), by name.
    """
    _check_where()
    schedule = _batches(schedule)
    _check(student, theta, images, labels, schedule, lr, momentum)
    lr = _rate(lr, theta)
    schedule = [index.to(images.device, non_blocking=True) for index in schedule]
    largest = _largest_label(labels) if loss is None else -1
    limit = _limit(memory)
    record = torch.is_grad_enabled() and any(t.requires_grad for t in (theta, images, labels, lr))
    training = replay.training(student, schedule, augment, loss, images.device, largest, record and limit > 0)
    plan = _Plan(training, momentum, limit, record)
    return _Unroll.apply(plan, theta.contiguous(), images, labels, lr)


def dsa_steps(seed: int, ops: Sequence[str] | None = None) -> Augment:
    """An `augment` for `unroll`: differentiable augmentation, drawn anew for each step from `seed` and the step."""

    def augment(images: Tensor, step: int) -> Tensor:
        drawn = dsa.draw(len(images), images.shape[-1], seeds.generator(seed, "dsa", step), ops=ops)
        return dsa.apply(images, drawn)

    return augment


@dataclass
class _Plan:
    """What an unroll is told, but for its tensors."""

    training: Training
    momentum: float
    limit: float  # bytes of step graphs that may be kept for the backward pass
    record: bool  # whether there will be one

    @property
    def steps(self) -> int:
        return len(self.training.schedule)

    def keep(self, graphs: dict[int, StepGraph | Replayed], step: int, graph: StepGraph | Replayed) -> None:
        """Add a step's graph to those that are kept: as many of the last ones, which are used up first, as fit. What
        the last replay left is there by itself, and as a rule still so when the backward pass begins with it."""
        if isinstance(graph, Replayed) and step == self.steps - 1:
            graphs[step] = graph
            return
        if not self.limit:
            return
        while graphs and sum(kept.bytes for kept in graphs.values()) + graph.bytes > self.limit:
            del graphs[min(graphs)]
        if graph.bytes <= self.limit and graph.hold():
            graphs[step] = graph


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:4]
        m, thetas, momenta, graphs = torch.zeros_like(theta), [], [], {}
        with plan.training.running() as pool:
            for step in range(plan.steps):
                measure = plan.record and 0 < plan.limit < math.inf
                graph, gradient = plan.training.build(step, theta, images, labels, needs, pool, measure)
                if step in (0, plan.steps - 1):
                    plan.training.check_buffers()
                if plan.record:
                    thetas.append(theta)
                    plan.keep(graphs, step, graph)
                theta, m = unroll_step(theta, m, gradient, lr, plan.momentum)
                if plan.record and ctx.needs_input_grad[4]:
                    momenta.append(m)
                del graph, gradient  # before the next is built
        if plan.record:
            ctx.plan, ctx.graphs = plan, graphs
            ctx.save_for_backward(images, labels, lr, *thetas, *momenta)
        return theta if plan.steps else theta.clone()

    @staticmethod
    def backward(ctx, d_theta: Tensor):
        with torch.no_grad():
            found = _walk_back(ctx, d_theta)
        if torch.is_grad_enabled():  # create_graph=True: refused when, and only when, it is differentiated again
            inputs = ctx.saved_tensors[:4]  # images, labels, lr, and theta where there is a step
            found = [None if d is None else _Once.apply(d, d_theta, *inputs) for d in found]
        return None, *found


def _walk_back(ctx, d_theta: Tensor) -> list[Tensor | None]:
    """Gradients in theta, images, labels and lr, from the last step to the first."""
    plan, (images, labels, lr, *kept) = ctx.plan, ctx.saved_tensors
    _, need_theta, need_images, need_labels, need_lr = ctx.needs_input_grad
    thetas, momenta = kept[:plan.steps], kept[plan.steps:]
    d_images = torch.zeros_like(images) if need_images else None
    d_labels = torch.zeros_like(labels) if need_labels else None
    d_lr = torch.zeros_like(lr) if need_lr else None
    d_m = torch.zeros_like(d_theta)
    with plan.training.running(again=True) as pool:
        for step in reversed(range(plan.steps)):
            graph = ctx.graphs.pop(step, None)
            if graph is None:
                graph = plan.training.build(step, thetas[step], images, labels, (need_images, need_labels), pool)[0]
            d_gradient, d_m, along_lr = unroll_step_adjoint(d_theta, d_m, momenta[step] if need_lr else None, lr,
                                                            plan.momentum)
            along = graph.adjoint(d_gradient, need_theta or step > 0, pool)
            del graph
            if need_lr:
                d_lr += along_lr
            if along[0] is not None:
                d_theta = d_theta + along[0]
            for total, rows in zip((d_images, d_labels), along[1:], strict=True):
                if rows is not None:
                    add_rows(total, plan.training.schedule[step], rows)
    return [d_theta if need_theta else None, d_images, d_labels, d_lr]


class _Once(torch.autograd.Function):
    """The identity; it hangs on `inputs` and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *slopes: Tensor):
        raise RuntimeError("speedk.unroll can be differentiated once, not twice: for second derivatives take plain "
                           "PyTorch steps with create_graph=True")


def _limit(memory: str | int) -> float:
    """Bytes of step graphs that may be kept."""
    named = {"constant": 0.0, "full": math.inf}
    if isinstance(memory, str) and memory in named:
        return named[memory]
    if isinstance(memory, bool) or not isinstance(memory, numbers.Real) or not memory >= 0:  # numpy's numbers, too
        raise ConfigError(f"memory={memory!r} is not 'constant', 'full' or a number of bytes")
    return float(memory)


def _rate(lr: Tensor | float, theta: Tensor) -> Tensor:
    try:
        if isinstance(lr, Tensor) and lr.is_complex():  # which would lose its imaginary part
            raise TypeError
        lr = torch.as_tensor(lr, dtype=theta.dtype, device=theta.device)
    except (TypeError, ValueError, RuntimeError):
        got = f"one that is {lr.dtype}" if isinstance(lr, Tensor) else type(lr).__name__
        raise ConfigError(f"lr must be a real scalar tensor, or a number, got {got}") from None
    if lr.dim():
        raise ConfigError(f"lr must be a scalar, got {tuple(lr.shape)}")
    return lr


def _batches(schedule: Iterable[Tensor]) -> list[Tensor]:
    try:
        batches = iter(schedule)
    except TypeError:  # a scalar tensor has an __iter__, too
        raise ConfigError(f"schedule must be index tensors, one a step, got {type(schedule).__name__}") from None
    return [_indices(index, step) for step, index in enumerate(batches)]


def _indices(index: Tensor | Sequence[int], step: int) -> Tensor:
    try:
        return torch.as_tensor(index).clone()  # the way back goes by it, whatever becomes of the caller's
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"schedule[{step}] must be int64 [B], or a sequence of ints, got {type(index).__name__}"
                          ) from None


def _largest_label(labels: Tensor) -> int:
    """The largest of int labels, none of which may be negative; -1 where they cannot be looked at, or are no classes.

    Cross entropy leaves out a label of -100 and divides by the number of the others, so that the pieces of a batch
    would not add up, and one that is too large ends a GPU's process. On a GPU this waits for the labels, once."""
    if labels.is_floating_point() or not len(labels) or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return -1
    least, largest = torch.stack(labels.aminmax()).tolist()
    if least < 0:
        raise ConfigError(f"there is a label {least}: labels are 0 to classes - 1 (a loss of your own may take others)")
    return largest


def _check_where() -> None:
    if torch.is_inference_mode_enabled():
        raise ConfigError("each step is differentiated, which torch.inference_mode forbids: take torch.no_grad")
    if torch._C._are_functorch_transforms_active():
        raise ConfigError("unroll cannot be called inside a transform of torch.func (grad, vmap, jvp, ...): take "
                          "torch.autograd.grad of what it gives")


def _check(student: nn.Module, theta: Tensor, images: Tensor, labels: Tensor, schedule: Sequence[Tensor],
           lr: Tensor | float, momentum: float) -> None:
    if not isinstance(student, nn.Module):
        raise ConfigError(f"student must be a torch.nn.Module, got {type(student).__name__}")
    for name, tensor in (("theta", theta), ("images", images), ("labels", labels), ("lr", lr)):
        if not isinstance(tensor, Tensor):
            if name == "lr":  # a number, or `_rate` says so
                continue
            raise ConfigError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_inference():
            raise ConfigError(f"{name} was made in torch.inference_mode, and nothing can be differentiated through it: "
                              "clone it outside")
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ConfigError(f"{name} has a tangent of forward-mode AD, which unroll has no rule for: take "
                              "torch.autograd.grad of what it gives")
    if not any(p.requires_grad for p in student.parameters()):
        raise ConfigError("the student has no parameter that requires a gradient, so nothing of it is trained: say "
                          "student.requires_grad_()")
    parameters = sum(p.numel() for p in student.parameters())
    if theta.shape != (parameters,):
        raise ConfigError(f"theta has shape {tuple(theta.shape)} but the student has {parameters} parameters: lay its "
                          "named_parameters() end to end, each flattened")
    if not theta.is_floating_point() or not images.is_floating_point():
        raise ConfigError(f"theta and images must be floating point, got {theta.dtype} and {images.dtype}")
    if images.dim() != 4:
        raise ConfigError(f"images must be [N, C, H, W], got {tuple(images.shape)}")
    if (labels.shape[:1] != images.shape[:1] or labels.dim() != (2 if labels.is_floating_point() else 1)
            or not (labels.is_floating_point() or labels.dtype == torch.int64)):
        raise ConfigError(f"labels must be int64 [{len(images)}] or float [{len(images)}, classes], got {labels.dtype} "
                          f"{tuple(labels.shape)}")
    floats = {t.dtype for t in (theta, images, labels) if t.is_floating_point()}
    if len(floats) > 1 and not torch.is_autocast_enabled(theta.device.type):
        raise ConfigError(f"theta is {theta.dtype}, images are {images.dtype}, labels {labels.dtype}: make the floats "
                          "one dtype")
    if not theta.device == images.device == labels.device:
        raise ConfigError(f"theta is on {theta.device}, images on {images.device}, labels on {labels.device}")
    if not isinstance(momentum, numbers.Real):
        raise ConfigError(f"momentum must be a number, got {type(momentum).__name__}")
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum={momentum} must be at least 0 and below 1")
    for step, index in enumerate(schedule):
        if index.dim() != 1 or index.dtype != torch.int64 or not len(index):
            raise ConfigError(f"schedule[{step}] must be int64 [B] with B at least 1, got {index.dtype} "
                              f"{tuple(index.shape)}")
        if index.device.type == "cpu" and not (int(index.min()) >= 0 and int(index.max()) < len(images)):
            raise ConfigError(f"schedule[{step}] points outside the {len(images)} images")
