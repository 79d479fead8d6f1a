"""Training steps as CUDA graphs: what a step launches is recorded once, and launched again at one stroke.

A step of a small student is some hundred kernels of a few microseconds each, which the host cannot launch as fast as
the GPU runs them. So a step's gradient is one recording and its adjoint another, on tensors that stay where they are:
theta, the augmented batch and the direction are copied in, the results out. Batches are gathered and augmented outside.

All recordings of a student compute in one pool of memory, where each may overwrite what another has left: nothing in
it counts from one replay to the next, but for an adjoint that follows its own gradient. To keep a step's graph is to
copy what the graph holds out of the pool, and to copy it back for the adjoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from speedk.distillation.unroll.graph import Alone, Augment, Batch, Loss, StepGraph, Training, alike, per_sample
from speedk.ops import dispatch
from speedk.workers import Pool

EAGER = 4
"""Steps of a kind that run as they are before it is recorded: what is run a few times is not worth a recording, and
what is compiled or looked up at the first run is there by then."""
MOST = 4
"""Recordings of a student. One more takes the place of the one that was used least recently, if that was RECENT or more
steps ago: a schedule of many shapes does not record each of them again and again."""
RECENT = 100
MANY = 1000  # kinds of steps that are counted

_log = logging.getLogger(__name__)
_of_students: weakref.WeakKeyDictionary[nn.Module, dict[torch.device, _Recordings]] = weakref.WeakKeyDictionary()
_recording = threading.Lock()  # PyTorch records one graph at a time


def training(student: nn.Module, schedule: list[Tensor], augment: Augment | None, loss: Loss | None,
             device: torch.device, largest_label: int, keep: bool) -> Training:
    """How a student is trained, by recordings where it can be; `keep`: graphs of steps are to be kept."""
    recorder = recorder_of(device)
    if (recorder is None or not per_sample(student, loss) or any(True for _ in student.buffers())
            or torch.is_autocast_enabled(device.type)):
        return Training(student, schedule, augment, loss, device, largest_label)
    return Replaying(student, schedule, augment, loss, device, largest_label, recorder, keep)


def forget() -> None:
    """Drop all recordings; their memory is free once what has been computed by them is."""
    _of_students.clear()


def recorder_of(device: torch.device) -> type[Recorder] | None:
    """What records on a device, if anything does."""
    return Recorder if device.type == "cuda" and os.environ.get("SPEEDK_CUDA_GRAPHS") != "0" else None


class Recorder:
    """Records what functions launch on a GPU, all in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool, self._last = device, torch.cuda.graph_pool_handle(), None
        self._nothing = torch.zeros((), device=device)

    def record(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        """What computes the results of `function` anew, in their places; and the results, which are not there yet."""
        graph, how = torch.cuda.CUDAGraph(), {"stream": _side(self._device), "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device):  # which `set_stream` changes
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, self._pool, **how):
                    found = function()
            except RuntimeError:
                # PyTorch does not undo what it has begun where CUDA has called it off.
                torch.cuda.set_stream(stream)
                with contextlib.suppress(RuntimeError):  # it has
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                    torch._C._cuda_releasePool(self._device.index, self._pool)
                # In 2.11 the default generator goes on as if it were recorded, and refuses to draw, until a recording
                # has come to its end.
                with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), **how):
                    self._nothing.zero_()
                torch.cuda.set_stream(stream)
                raise
        return graph.replay, found

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream that is recorded, so that the libraries' workspaces for it are made outside of the pool."""
        with torch.cuda.device(self._device):
            stream, side = torch.cuda.current_stream(), _side(self._device)
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                yield
            stream.wait_stream(side)

    def follow(self) -> None:
        """Let the current stream wait for the one of the last replay, which was in the same memory."""
        stream = torch.cuda.current_stream(self._device)
        if self._last not in (None, stream):
            stream.wait_stream(self._last)
        self._last = stream


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Replaying(Training):
    """Training whose steps are recorded and replayed. Whatever cannot be runs as it is: the same bits, more slowly."""

    def __init__(self, student: nn.Module, schedule: list[Tensor], augment: Augment | None, loss: Loss | None,
                 device: torch.device, largest_label: int, recorder: type[Recorder], keep: bool) -> None:
        super().__init__(student, schedule, augment, loss, device, largest_label)
        self._keep, self._kind, self._again = keep, None, False
        found = _of_students.setdefault(student, {})
        self._recordings = found.get(device) or found.setdefault(device, _Recordings(recorder(device)))

    @contextlib.contextmanager
    def running(self, again: bool = False) -> Iterator[Pool | Alone]:
        with super().running(again) as pool:
            kind = _kind(self.student, self.device)
            self._kind = None if kind is None else self._recordings.number((kind, *self.names, *self.shapes,
                                                                            *self.trained))
            self._again = again
            yield pool

    def build(self, step: int, theta: Tensor, images: Tensor, labels: Tensor, needs: tuple[bool, bool],
              pool: Pool | Alone, measure: bool = False) -> tuple[StepGraph | Replayed, Tensor]:
        with self._replayed(step):
            batch = self.batch(step, images, labels, needs, measure)
        recording = None if self._kind is None else self._found(batch, theta, needs)
        if recording is None:
            return self.graph(batch, theta, needs, pool, measure)
        self.classes = recording.classes
        self.check_labels()
        return recording.run(batch, theta, sum(batch.sizes().values()) + recording.bytes if measure else 0)

    def _found(self, batch: Batch, theta: Tensor, needs: tuple[bool, bool]) -> _Recording | None:
        tensors = [(t.shape, t.stride(), t.dtype) for t in (theta, batch.augmented, batch.labels)]
        key = (self._kind, *tensors, *needs, self._keep)
        found = self._recordings.find(key)
        # On the way back autograd has the thread: nothing is recorded there.
        if found is None and not self._again and self._recordings.due(key):
            make = functools.partial(_Recording, self, self._recordings.memory, batch, theta, needs, self._keep)
            return self._recordings.add(key, make)
        return found


class _Recordings:
    """Those of a student on a device."""

    def __init__(self, recorder: Recorder) -> None:
        self.memory = _Memory(recorder)
        self._found: dict[Hashable, _Recording] = {}
        self._eager: dict[Hashable, float] = {}  # steps of a kind that ran so far; -inf: it cannot be recorded
        self._kinds: dict[Hashable, int] = {}
        self._numbers, self._steps = itertools.count(), 0

    def number(self, kind: Hashable) -> int:
        """In place of what takes long to compare."""
        if kind not in self._kinds and len(self._kinds) >= MANY:
            self._kinds.clear()  # no number comes twice, so what goes by the old ones is found no more
        return self._kinds.setdefault(kind, next(self._numbers))

    def find(self, key: Hashable) -> _Recording | None:
        self._steps += 1
        found = self._found.get(key)
        if found is not None:
            found.used = self._steps
        return found

    def due(self, key: Hashable) -> bool:
        """Whether to record a kind of step, one of which is about to run."""
        if key not in self._eager and len(self._eager) >= MANY:
            self._eager.clear()
        self._eager[key] = count = self._eager.get(key, 0) + 1
        used = [found.used for found in list(self._found.values())]  # another thread may be adding
        return count > EAGER and (len(used) < MOST or self._steps - min(used) >= RECENT)

    def add(self, key: Hashable, make: Callable[[], _Recording]) -> _Recording | None:
        """What `make` records, if it can be recorded and computes what the step itself computes."""
        if not _recording.acquire(blocking=False):  # another thread is at it, and may need this one's autograd
            return None
        short = False
        try:
            if len(self._found) >= MOST:
                del self._found[min(self._found, key=lambda key: self._found[key].used)]
            self._found[key] = made = make()
            made.used = self._steps
            return made
        except torch.OutOfMemoryError:
            _log.debug("the steps of this student run unrecorded: no memory to record one", exc_info=True)
            self._eager.update(dict.fromkeys((key, *self._found), -math.inf))
            self._found.clear()
            short = True
        except (RuntimeError, _Differs):
            _log.debug("a kind of step runs unrecorded", exc_info=True)
            self._eager[key] = -math.inf
        finally:
            _recording.release()
        if short:  # and what was recorded of it is gone now
            torch.cuda.empty_cache()
        return None


class _Memory:
    """Where the recordings of a student compute, one at a time."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.replays, self._lock = recorder, 0, threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Alone in here. Whoever is waits for nobody, autograd's thread included, where others may wait for this."""
        with self._lock:
            self.recorder.follow()
            yield


class _Differs(Exception):
    """A replay does not give a step's bits."""


class _Recording:
    """A step's gradient and its adjoint, recorded, and the tensors that they read and write."""

    used = 0  # when it was last, in steps

    def __init__(self, training: Training, memory: _Memory, batch: Batch, theta: Tensor, needs: tuple[bool, bool],
                 keep: bool) -> None:
        given = (theta.detach(), batch.augmented.detach(), batch.labels)
        self._memory, self._inputs, graphs = memory, [t.clone() for t in given], []
        self._direction, images = torch.empty_like(self._inputs[0]), self._inputs[1]
        still = Batch(images, images, self._inputs[2])

        def forward() -> list[Tensor]:
            graph, gradient = training.graph(still, self._inputs[0], needs, Alone(), note=keep)
            graphs.append(graph)
            return [gradient, *map(_flat, self._held(graph) if keep else ())]

        def backward() -> list[Tensor]:
            # What is to be kept is copied back there, again and again; else what follows may take its memory.
            graph = graphs[0] if keep else graphs.pop()
            along = graph.adjoint(self._direction, True, Alone(), retain=keep)
            self._there = [d is not None for d in along]
            return [d for d in along if d is not None]

        with memory.recorder.aside():  # on the tensors themselves, whose strides a copy need not have
            graph, gradient = training.graph(Batch(given[1], *given[1:]), given[0], needs, Alone())
            want = [gradient, *(d for d in graph.adjoint(gradient, True, Alone()) if d is not None)]
            del graph
        self._forward, (self._gradient, *self._kept) = memory.recorder.record(forward)
        self._backward, self._along = memory.recorder.record(backward)
        self._graphs = graphs  # what a graph holds unseen stays as well: no other recording may take its place
        self.bytes, self.classes = sum(t.nbytes for t in self._kept), training.classes
        if not self._same(given, want, keep):
            raise _Differs("its replay gives other bits than the step itself")

    def run(self, batch: Batch, theta: Tensor, size: int) -> tuple[Replayed, Tensor]:
        """A step that can be differentiated and holds `size` bytes, and its gradient."""
        with self._memory.turn():
            self._step(theta, batch)
            return Replayed(self, batch, theta.detach(), size, self._memory.replays), self._gradient.clone()

    def copy(self, replay: int) -> list[Tensor] | None:
        """What the graph of that replay holds, but for its inputs; None where it is gone."""
        with self._memory.turn():
            return [t.clone() for t in self._kept] if self._memory.replays == replay else None

    def adjoint(self, batch: Batch, theta: Tensor, kept: list[Tensor] | None, replay: int,
                direction: Tensor) -> list[Tensor | None]:
        """`StepGraph.adjoint` in theta, the augmented images and the labels."""
        with self._memory.turn():
            if kept is not None:
                self._load(theta, batch)
                for t, value in zip(self._kept, kept, strict=True):
                    t.copy_(value)
            elif self._memory.replays != replay:
                self._step(theta, batch)
            self._memory.replays += 1
            self._direction.copy_(direction)
            self._backward()
            along = iter([d.clone() for d in self._along])
        return [next(along) if there else None for there in self._there]

    def _held(self, graph: StepGraph) -> list[Tensor]:
        """What a graph holds beside the inputs: one tensor of each storage."""
        inputs = {t.untyped_storage().data_ptr() for t in self._inputs}
        return [t for address, t in graph.saved().items()
                if address and address not in inputs and t.device == self._direction.device]

    def _load(self, theta: Tensor, batch: Batch) -> None:
        self._memory.replays += 1  # from here on, whatever may stop this, nothing of the last one counts
        for t, value in zip(self._inputs, (theta, batch.augmented, batch.labels), strict=True):
            t.copy_(value.detach())

    def _step(self, theta: Tensor, batch: Batch) -> None:
        self._load(theta, batch)
        self._forward()

    def _same(self, given: tuple[Tensor, ...], want: list[Tensor], keep: bool) -> bool:
        """Whether replays give the bits `want`, with `want[0]` as direction, and with another step in between if this
        is to be kept."""
        theta, images, labels = given
        batch = Batch(images, images, labels)
        replayed, gradient = self.run(batch, theta, 0)
        if keep and replayed.hold():
            # One that is not a multiple of this one: ReLU's would be the same.
            self.run(dataclasses.replace(batch, augmented=-images), theta.flip(0), 0)
        along = replayed.adjoint(want[0], True, Alone())
        return all(map(alike, [gradient, *(d for d in along if d is not None)], want))


class Replayed:
    """In place of a step's graph: what replays it, and what it holds if it is kept."""

    def __init__(self, recording: _Recording, batch: Batch, theta: Tensor, size: int, replay: int) -> None:
        self._recording, self._batch, self._theta, self.bytes, self._replay = recording, batch, theta, size, replay
        self._kept: list[Tensor] | None = None

    def hold(self) -> bool:
        """Copy what the graph holds, if it is still there; whether it was."""
        self._kept = self._recording.copy(self._replay)
        return self._kept is not None

    def adjoint(self, direction: Tensor, need_theta: bool, pool: Pool | Alone) -> tuple[Tensor | None, ...]:
        """As of a StepGraph."""
        theta, images, labels = self._recording.adjoint(self._batch, self._theta, self._kept, self._replay, direction)
        return theta if need_theta else None, self._batch.to_source(images), labels


def _flat(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _kind(student: nn.Module, device: torch.device) -> Hashable | None:
    """All that a step's launches depend on beside its tensors; None where that cannot be told, or nothing recorded."""
    try:
        if (torch.compiler.is_compiling() or torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack()
                or nn.modules.module._has_any_global_hook()
                or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())):
            return None
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        skipped = ("_parameters", "_buffers", "_modules")
        modules = tuple((name, type(module), *((key, _told(value)) for key, value in vars(module).items()
                                               if key not in skipped)) for name, module in student.named_modules())
        return (modules, dispatch.forced(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
                cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision, cudnn.fp32_precision,
                products.fp32_precision, torch.backends.fp32_precision, products.allow_fp16_accumulation,
                products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction)
    except (TypeError, AttributeError):  # the student has what cannot be told, or PyTorch no longer has a name of these
        _log.debug("the steps of this student run unrecorded", exc_info=True)
        return None


def _told(value: object) -> Hashable:
    """A module's attribute, to be compared later; it holds nothing that could hold the module. Raises TypeError where
    it cannot be told from another one: a tensor, or something that changes unseen."""
    if isinstance(value, (tuple, list)):
        return type(value), *map(_told, value)
    if (isinstance(value, (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device))
            or (isinstance(value, types.FunctionType) and not value.__closure__)
            or (isinstance(value, types.BuiltinFunctionType)
                and isinstance(value.__self__, (type(None), type, types.ModuleType)))):
        return type(value), value
    if dataclasses.is_dataclass(value):
        return type(value), *map(_told, vars(value).values())
    if isinstance(value, (dict, set)) and not value:  # hooks, as a rule
        return type(value)
    raise TypeError(f"an attribute that is a {type(value).__name__}")
