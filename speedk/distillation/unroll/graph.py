"""One training step as a graph: built, differentiated along a direction, dropped. What `unroll` walks over.

Every way to unroll builds a step with `Training.build` and differentiates it with `StepGraph.adjoint`, so all of them
give the same bits, where the operations themselves do.
"""

from __future__ import annotations

import contextlib
import copy
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from speedk import networks, seeds
from speedk.errors import ConfigError
from speedk.training import repeatable, separable
from speedk.workers import Pool

GRAPH_PIECE_PIXELS = 16 * 32 * 32
"""Count x height x width of one thread's piece of a batch, whose graph is differentiated again: 16 images of 32 x 32,
so that a batch of 64 keeps four cores busy. Their activations stay in the caches; smaller pieces save no more."""

NO_PATH = ("the loss hangs on no parameter of the student: compute it from the logits, by operations that can be "
           "differentiated")

Augment = Callable[[Tensor, int], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Batch:
    """What a step trains on; augmentation's own graph hangs on `augmented`."""

    source: Tensor  # the images before augmentation
    augmented: Tensor
    labels: Tensor
    saved: Held | None = None  # what augmentation has saved, where it was noted

    def to_source(self, along: Tensor | None) -> Tensor | None:
        """A gradient in the augmented images, in those before. The graph between them is used up."""
        if along is None or self.augmented is self.source:
            return along
        with _own_dtypes(self.source):
            return torch.autograd.grad(self.augmented, self.source, along, materialize_grads=True)[0]

    def sizes(self) -> dict[int, int]:
        """Bytes of the storages that all this holds, by address."""
        own = {_address(t): t.untyped_storage().nbytes() for t in (self.source, self.augmented, self.labels)}
        return own | (self.saved.sizes() if self.saved else {})


@dataclass
class StepGraph:
    """The graph that the gradient of one step hangs on, in pieces of the batch. The gradient itself is not kept."""

    pieces: list[_Piece]
    batch: Batch
    bytes: int = 0  # what all this holds; 0 where it was not measured

    def hold(self) -> bool:
        """Whether this is there until it is used up: a graph is, by itself."""
        return True

    def adjoint(self, direction: Tensor, need_theta: bool, pool: Pool | Alone,
                retain: bool = False) -> tuple[Tensor | None, ...]:
        """The gradients of <gradient, direction [P]> in theta [P], and in the batch's images and labels where they are
        differentiated; None elsewhere. The graph is used up, unless it is retained."""
        parts = pool.map(_differentiate, [(piece, direction, need_theta, retain) for piece in self.pieces])
        along_theta, along_images, along_labels = zip(*parts, strict=True)
        along_theta = _sum(along_theta) if need_theta else None
        along_images, along_labels = (None if p[0] is None else torch.cat(p) for p in (along_images, along_labels))
        return along_theta, self.batch.to_source(along_images), along_labels

    def saved(self) -> dict[int, Tensor]:
        """The tensors that the pieces' graphs hold, where they were noted: one of each storage, by its address."""
        return {address: t for piece in self.pieces for address, t in piece.saved.alive().items()}


@dataclass
class _Piece:
    """A part of a batch: the leaves of its graph, and where in it each gradient is; None: it depends on nothing."""

    parameters: list[Tensor]
    images: Tensor
    labels: Tensor
    gradients: list[GradientEdge | None]
    saved: Held


class Training:
    """How a student is trained: all about the steps but the tensors that are differentiated.

    schedule: index tensors on the images' device; largest_label: for cross entropy, whose number of classes is known
    when the first logits are; the rest as in `unroll`.
    """

    def __init__(self, student: nn.Module, schedule: list[Tensor], augment: Augment | None, loss: Loss | None,
                 device: torch.device, largest_label: int = -1) -> None:
        self.student, self.schedule, self.augment, self.loss, self.device = student, schedule, augment, loss, device
        self.largest_label, self.classes = largest_label, 0  # those of the student: known from its first logits on
        named = dict(student.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        self.trained = [p.requires_grad for p in named.values()]
        self.buffers = {name: b.detach().clone() for name, b in student.named_buffers()}
        self.per_sample = per_sample(student, loss)
        self.in_pieces = device.type == "cpu" and self.per_sample
        self._pool = Pool(device) if self.in_pieces else Alone()
        self._replaced: set[str] = set()
        self._students = [student]
        self._modes = [(module, module.training) for module in student.modules()]
        self._graph_bytes: dict[torch.Size, int] = {}  # of the pieces' graphs, by the shape of the batch
        self._seed = int(torch.randint(2**62, ()))
        self._draws = not self.per_sample or augment is not None  # random numbers, in a step
        kind = device.type
        self._autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind),
                          "enabled": torch.is_autocast_enabled(kind), "cache_enabled": False}

    @contextlib.contextmanager
    def running(self, again: bool = False) -> Iterator[Pool | Alone]:
        """Where steps are built and differentiated, forward and backward (`again`) alike; gives what runs the
        pieces."""
        with (networks.twice_differentiable(), repeatable(self.device), _in_modes(self._modes), self._chance(),
              self._pool as pool):
            yield pool

    def build(self, step: int, theta: Tensor, images: Tensor, labels: Tensor, needs: tuple[bool, bool],
              pool: Pool | Alone, measure: bool = False) -> tuple[StepGraph, Tensor]:
        """The graph of one step at `theta`, and the gradient [P]; `needs` says whether images and labels are
        differentiated."""
        with self._replayed(step):
            batch = self.batch(step, images, labels, needs, measure)
            return self.graph(batch, theta, needs, pool, measure)

    def batch(self, step: int, images: Tensor, labels: Tensor, needs: tuple[bool, bool], measure: bool) -> Batch:
        """What a step trains on."""
        index = self.schedule[step]
        source = augmented = images.detach().index_select(0, index).requires_grad_(needs[0])
        labels, saved = labels.detach().index_select(0, index), Held() if measure else None
        if self.augment is not None:
            with torch.enable_grad(), torch.autocast(**self._autocast), saved or contextlib.nullcontext():
                augmented = self.augment(source, step)
            _check_augmented(augmented, source)
        return Batch(source, augmented, labels, saved)

    def graph(self, batch: Batch, theta: Tensor, needs: tuple[bool, bool], pool: Pool | Alone, measure: bool = False,
              note: bool = False) -> tuple[StepGraph, Tensor]:
        """The graph of a step on `batch`, and the gradient [P]. `note`: its tensors can be asked for."""
        shape, count = batch.augmented.shape, len(batch.labels)
        rows = max(1, GRAPH_PIECE_PIXELS // batch.augmented[0, 0].numel()) if self.in_pieces else count
        parts = list(zip(batch.augmented.detach().split(rows), batch.labels.split(rows), strict=True))
        while len(self._students) < len(parts):
            # Threads must not share a module, as each puts its parameters in; the tensors are shared.
            held = [*self.student.parameters(), *self.student.buffers()]
            self._students.append(copy.deepcopy(self.student, {id(tensor): tensor for tensor in held}))
        values, note = theta.detach().split(self.sizes), note or (measure and shape not in self._graph_bytes)
        made = pool.map(self._piece, [(student, values, *part, len(part[0]) / count, needs, note)
                                      for student, part in zip(self._students, parts)])
        pieces, gradients = zip(*made, strict=True)
        graph = StepGraph(list(pieces), batch)
        if measure:
            graph.bytes = self._bytes(graph, theta)
        return graph, _sum(gradients)

    def _bytes(self, graph: StepGraph, theta: Tensor) -> int:
        """What is held for a step: its batch, what augmentation saved, and the graphs of the pieces, which are asked
        once for a shape. Not theta and the buffers, which are there in any case."""
        beside, shape = graph.batch.sizes(), graph.batch.augmented.shape
        if shape not in self._graph_bytes:
            known = {_address(t) for t in (theta, *self.buffers.values())} | beside.keys()
            self._graph_bytes[shape] = sum(t.untyped_storage().nbytes() for address, t in graph.saved().items()
                                           if address not in known)
        return self._graph_bytes[shape] + sum(beside.values())

    def _piece(self, student: nn.Module, values: Sequence[Tensor], images: Tensor, labels: Tensor, share: float,
               needs: tuple[bool, bool], note: bool) -> tuple[_Piece, Tensor]:
        """A part of a batch, `share` of the whole, and its part of the gradient [P].

        The graph is made where it will be dropped, too: PyTorch computes some gradients otherwise where they have to
        be differentiable, and the bits must not depend on what is kept.
        """
        saved = Held()
        # autocast around the gradient as well: it must not depend on what the backward pass, or a thread, is set to.
        with torch.enable_grad(), torch.autocast(**self._autocast), saved if note else contextlib.nullcontext():
            parameters = [v.view(shape).requires_grad_() for v, shape in zip(values, self.shapes, strict=True)]
            images, labels = images.requires_grad_(needs[0]), labels.requires_grad_(needs[1])
            logits = self._call(student, parameters, images)
            if self.loss is None:  # one of your own may take what it likes
                self.classes = _classes(logits, labels)
                self.check_labels()
            loss = (self.loss or F.cross_entropy)(logits, labels)
            _check_loss(loss)
            if share != 1:
                loss = loss * share
            trained = [p for p, is_trained in zip(parameters, self.trained, strict=True) if is_trained]
            reached = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
            if all(g is None for g in reached):  # the loss hangs on the images alone
                raise ConfigError(NO_PATH)
            found = iter(reached)
            gradients = [next(found) if is_trained else None for is_trained in self.trained]
            gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        flat = torch.cat([g.detach().flatten() for g in gradients])
        edges = [get_gradient_edge(g) if g.requires_grad else None for g in gradients]
        return _Piece(parameters, images, labels, edges, saved), flat

    def _call(self, student: nn.Module, parameters: list[Tensor], images: Tensor) -> Tensor:
        state = {**self.buffers, **dict(zip(self.names, parameters, strict=True))}
        logits = functional_call(student, state, (images,))
        self._replaced |= {name for name, b in self.buffers.items() if state[name] is not b}
        return logits

    def check_labels(self) -> None:
        """Raise ConfigError where there is a label that the student has no logit for."""
        if self.largest_label >= self.classes:
            raise ConfigError(f"there is a label {self.largest_label} but the student gives {self.classes} logits: "
                              f"labels are 0 to {self.classes - 1}")

    def check_buffers(self) -> None:
        """Raise ConfigError if the steps so far have changed a buffer; in a GPU's memory that waits for them."""
        before = dict(self.student.named_buffers())
        changed = [name for name, b in self.buffers.items()
                   if name in self._replaced or not alike(b, before[name])]
        if changed:
            raise ConfigError(f"the student changes its buffers {', '.join(changed)} as it trains, which is not "
                              "unrolled: put those modules in eval mode, or take a norm without running statistics")

    @contextlib.contextmanager
    def _chance(self) -> Iterator[None]:
        """Python's and numpy's generators, which steps seed, are afterwards as they were. Once for all steps: numpy
        takes a tenth of a millisecond for it."""
        if not self._draws:
            yield
            return
        states = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    @contextlib.contextmanager
    def _replayed(self, step: int) -> Iterator[None]:
        """Random numbers that follow from the step alone."""
        if not self._draws:
            yield
            return
        seed = seeds.derive(self._seed, "unroll", step)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.random.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(seed)
            yield


@contextlib.contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Inside, each module trains or not as it did at the start, whatever was said since: a step that is built again has
    to be the one that ran. Set one by one, as `train` reaches the modules below and may be the user's own."""
    now = [(module, module.training) for module, _ in modes]
    try:
        for module, mode in modes:
            module.training = mode
        yield
    finally:
        for module, mode in now:
            module.training = mode


class Alone(contextlib.nullcontext):
    """In place of a pool where a batch is one piece."""

    def __enter__(self) -> Alone:
        return self

    def map(self, work: Callable[..., Any], items: Sequence[tuple]) -> list[Any]:
        return [work(*item) for item in items]


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Notes what graphs built inside it hold."""

    def __init__(self) -> None:
        self._tensors: list[weakref.ref[Tensor]] = []
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        held = tensor.detach()  # a node that holds its own output would never be freed
        self._tensors.append(weakref.ref(held))
        return held

    def alive(self) -> dict[int, Tensor]:
        """Of the tensors that are still held, one of each storage, by its address."""
        return {_address(t): t for t in (ref() for ref in self._tensors) if t is not None}

    def sizes(self) -> dict[int, int]:
        """Bytes of the storages, by address."""
        return {address: t.untyped_storage().nbytes() for address, t in self.alive().items()}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def per_sample(student: nn.Module, loss: Loss | None) -> bool:
    """Whether each sample counts for itself in a step, and nothing in it is random but augmentation."""
    return loss is None and bool(getattr(student, "per_sample", False)) and separable(student)


def _check_augmented(augmented: Any, source: Tensor) -> None:
    if (not isinstance(augmented, Tensor) or not augmented.is_floating_point()
            or augmented.shape[:1] != source.shape[:1]):
        raise ConfigError(f"augment must give a batch of {len(source)} images, floating point, got {_told(augmented)}")
    if source.requires_grad and not augmented.requires_grad:
        raise ConfigError("the images require a gradient, but what augment gives does not hang on those it was given: "
                          "augment them by operations that can be differentiated")


def _classes(logits: Any, labels: Tensor) -> int:
    """The number of classes of what a student gives for a batch, checked: cross entropy follows."""
    if (not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2
            or len(logits) != len(labels)):
        raise ConfigError(f"the student must give logits [B, classes], B = {len(labels)} here, got {_told(logits)}: a "
                          "loss of your own may take others")
    if labels.dim() == 2 and labels.shape[1] != logits.shape[1]:
        raise ConfigError(f"labels are of {labels.shape[1]} classes but the student gives {logits.shape[1]} logits")
    return logits.shape[1]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"loss must give a scalar tensor, got {_told(loss)}: take the mean over the batch")
    if not loss.requires_grad:
        raise ConfigError(NO_PATH)


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, nan like nan."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _differentiate(piece: _Piece, direction: Tensor, need_theta: bool, retain: bool) -> tuple[Tensor | None, ...]:
    """The gradients of <gradient, direction> in the parameters [P], images and labels of a piece."""
    along = direction.split([p.numel() for p in piece.parameters])
    pairs = [(edge, d.view_as(p)) for edge, d, p in zip(piece.gradients, along, piece.parameters, strict=True) if edge]
    leaves = [*(piece.parameters if need_theta else []), *(t for t in (piece.images, piece.labels) if t.requires_grad)]
    if leaves and pairs:
        gradients, directions = zip(*pairs, strict=True)
        with _own_dtypes(direction):
            found = torch.autograd.grad(gradients, leaves, directions, retain_graph=retain, materialize_grads=True)
        found = list(found)
    else:  # a gradient that depends on nothing
        found = [torch.zeros_like(leaf) for leaf in leaves]
    along_labels = found.pop() if piece.labels.requires_grad else None
    along_images = found.pop() if piece.images.requires_grad else None
    return torch.cat([d.flatten() for d in found]) if need_theta else None, along_images, along_labels


def _own_dtypes(tensor: Tensor) -> torch.autocast:
    """What a graph was built with decides its dtypes: autocast where it is differentiated does not."""
    return torch.autocast(tensor.device.type, enabled=False)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In order, so that the bits do not depend on which thread came first."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
