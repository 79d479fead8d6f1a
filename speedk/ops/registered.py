"""Ops as PyTorch's dispatcher knows them, and the short way past it where nothing there has a say.

By way of the dispatcher a call comes back to Python twice, for autograd and for the kernel, which takes the host longer
than the launch itself, and a training step on a GPU is bound by such times. What the dispatcher is for (tracing, fake
tensors, transforms, modes, subclasses) shows in the keys of the tensors and of the thread. Where those are the plain
ones, an op is called as what it is: a function, or an autograd.Function of the same two halves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def custom_op(name: str, fits: Callable | None = None) -> Callable[[Callable], Registered]:
    """`torch.library.custom_op` of a function that writes to none of its arguments.

    `fits` refuses what comes by way of the dispatcher. The short way is this package's own: who calls there has looked.
    """

    def register(body: Callable) -> Registered:
        def checked(*arguments: object) -> object:
            fits(*arguments)
            return body(*arguments)

        schema = torch.library.infer_schema(body, mutates_args=())
        op = torch.library.custom_op(name, body if fits is None else checked, mutates_args=(), schema=schema)
        op.__class__ = Registered  # it holds no state but what follows
        op.body, op.function = body, None
        return op

    return register


class Registered(torch.library.CustomOpDef):
    """A custom op, called without the dispatcher where that makes no difference."""

    body: Callable
    function: type[torch.autograd.Function] | None  # None: not differentiable, which the dispatcher will say

    def __call__(self, *arguments: object) -> object:
        if not _SHORT or torch.compiler.is_compiling():
            return super().__call__(*arguments)
        lengths = [len(a) if type(a) is list else None for a in arguments] if list in map(type, arguments) else None
        flat = arguments if lengths is None else _flat(arguments)
        if not _plain(flat):
            return super().__call__(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*flat)):
            return self.body(*arguments)
        if self.function is None:
            return super().__call__(*arguments)
        return self.function.apply(*flat) if lengths is None else self.of_lists.apply(lengths, *flat)

    def register_autograd(self, backward: Callable, /, *, setup_context: Callable | None = None) -> None:
        super().register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *arguments: object) -> object:
            output = self.body(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        # An autograd.Function does not look into lists: one that takes them gets what is in them, and their lengths.
        def forward_of_lists(ctx, lengths: list[int | None], *flat: object) -> object:
            values = iter(flat)
            return forward(ctx, *(next(values) if length is None else list(itertools.islice(values, length))
                                  for length in lengths))

        def backward_of_lists(ctx, *gradients: Tensor | None) -> tuple:
            return None, *_flat(backward(ctx, *gradients))

        name = self._qualname.replace("::", "_")
        self.function = _function(name, forward, backward)
        self.of_lists = _function(name, forward_of_lists, backward_of_lists)

    def ends(self, op: str, times: str = "once") -> None:
        """This is the last derivative that kernels have of `op`: the next one is refused, with what to do. By way of
        the dispatcher alone: an autograd.Function would give what is in a returned list without the refusal."""

        def refuse(ctx, *gradients: Tensor | None) -> None:
            raise RuntimeError(f"{op} is differentiable {times} on this backend, and this goes beyond: "
                               'wrap the forward pass in `with speedk.use_backend("torch")`')

        super().register_autograd(refuse)


def _function(name: str, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    halves = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), halves)


def _flat(values: Sequence[object]) -> list[object]:
    """The values, and in place of a list what is in it."""
    return [inner for value in values for inner in (value if type(value) is list else (value,))]


def _plain(arguments: tuple) -> bool:
    """Whether the dispatcher would do nothing but autograd and the kernel."""
    # A profile names what goes through the dispatcher; forward-mode differentiation has no key.
    if not _in_no_mode() or torch.autograd._profiler_enabled() or forward_ad._current_level >= 0:
        return False
    keys = torch._C._dispatch_keys
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is nn.Parameter:
            if keys(argument).raw_repr() not in _known and not _is_known_now(argument):
                return False
        elif isinstance(argument, (Tensor, list, tuple)):
            return False
    return True


def _of_tensor(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


def _of_thread() -> tuple[int, int]:
    """The dispatch keys that this thread adds and leaves out: modes, transforms, autocast, what is below autograd."""
    return (torch._C._dispatch_tls_local_include_set().raw_repr(),
            torch._C._dispatch_tls_local_exclude_set().raw_repr())


def _in_no_mode() -> bool:
    """Whether this thread is as a new one, or as a backward pass in a new one, in which some PyTorch leave out more."""
    now = _of_thread()
    if now not in _of_new_threads and len(_of_new_threads) == 1 and torch._C._current_graph_task_id() >= 0:
        _of_new_threads.append(_pass_in_a_new_thread())
    return now in _of_new_threads


def _pass_in_a_new_thread() -> tuple[int, int]:
    """`_of_thread` in a backward pass. Not found on import, as it has the engine start threads, which forks dislike."""
    found = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, d_out: Tensor) -> Tensor:
            found.append(_of_thread())
            return d_out

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: Look.apply(torch.ones((), requires_grad=True)).backward()).result()
    return found[0]


def _is_known_now(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers, neither fake nor batched nor negated in name only: for the first of a
    GPU's, which nobody wants to wake up on import."""
    if tensor.is_cuda:
        _known.add(_of_tensor(torch.empty(0, device=tensor.device)))
    return _of_tensor(tensor) in _known


_SHORT = hasattr(forward_ad, "_current_level") and hasattr(torch.autograd, "_profiler_enabled") and all(
    hasattr(torch._C, name) for name in ("_any_requires_grad", "_dispatch_keys", "_dispatch_tls_local_include_set",
                                         "_dispatch_tls_local_exclude_set", "_current_graph_task_id"))
"""Whether this PyTorch shows what has a say: these names are its own. Without them every call goes the long way."""

if _SHORT:
    _known = {_of_tensor(torch.empty(0, device="cpu"))}
    with ThreadPoolExecutor(1) as _pool:  # a new thread is in no mode, whatever the one is in that imports this
        _of_new_threads = [_pool.submit(_of_thread).result()]
