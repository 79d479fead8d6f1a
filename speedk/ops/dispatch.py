"""Which backend runs an op: the first of Triton, native (C++/CUDA) and PyTorch that takes what it is given; where both
are there for a GPU, an op may put native first.

A backend other than PyTorch is a function `why_not(*arguments) -> str | None` in the op's table: the reason it cannot
take these arguments, or None. Nothing here catches an error of a kernel: one that fails, fails aloud.

`use_backend("native")` and the environment variable SPEEDK_BACKEND are strict: an op that cannot run there raises a
ValueError with the reason. `explain("mhsc", scm, saet)` lists the reasons. A backward pass is not strict about the ops
that it calls beside its own kernel: `Op.prefer`.

Under autocast every op computes in the widest dtype among its arguments, whatever its backend: `autocast`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from speedk.errors import ConfigError
from speedk.ops.autocast import in_the_widest

BACKENDS = ("triton", "native", "torch")
WhyNot = Callable[..., "str | None"]

_ops: dict[str, Op] = {}
_public: dict[str, Callable] = {}
_forced: str | None = None
_asking: set[int] = set()  # the threads that are in `explain`


class Op:
    """An op's table of backends. PyTorch is always there and takes everything; a backend that is left out has no
    kernel for this op. `cuda`: whether the native kernel is there for the GPU, too; `cpu`: for the CPU; `first`: the
    backend that comes before the others."""

    def __init__(self, name: str, *, triton: WhyNot | None = None, native: WhyNot | None = None, cuda: bool = False,
                 cpu: bool = True, first: str = BACKENDS[0]) -> None:
        self.name, self.cuda, self.cpu = name, cuda, cpu
        self.order = (first, *(b for b in BACKENDS if b != first))
        self._why_not = {"triton": triton, "native": native}
        _ops[name] = self

    @property
    def backends(self) -> list[str]:
        """The backends that have a kernel for this op, first choice first."""
        return [b for b in self.order if b == "torch" or self._why_not[b] is not None]

    def why_not(self, backend: str, *arguments: object) -> str | None:
        """The reason that `backend` cannot run this op on `arguments`, or None."""
        if backend == "torch":
            return None
        if transformed():
            return "functorch transforms and forward-mode differentiation see through PyTorch alone"
        check = self._why_not[backend]
        if check is None:
            return f"there is no {backend} kernel of {self.name}"
        return check(*arguments)

    def choose(self, *arguments: object) -> str:
        """The backend for `arguments`. Raises ConfigError where one is forced that cannot take them."""
        if _asking and threading.get_ident() in _asking:
            raise _Asked(self, arguments)
        if _forced is not None:
            reason = self.why_not(_forced, *arguments)
            if reason is not None:
                raise ConfigError(f"{self.name} cannot run on the {_forced} backend: {reason}")
            return _forced
        return self._first(*arguments)

    def prefer(self, *arguments: object) -> str:
        """The backend for a call that a backward pass makes: the one that is forced where it takes `arguments`, else
        the first that does."""
        if _forced is not None and self.why_not(_forced, *arguments) is None:
            return _forced
        return self._first(*arguments)

    def _first(self, *arguments: object) -> str:
        for backend in self.order:
            # Triton's interpreter is for tests: right and very slow, so it has to be asked for by name.
            if not (backend == "triton" and INTERPRETED) and self.why_not(backend, *arguments) is None:
                return backend
        raise AssertionError("unreachable: the torch backend takes everything")


class _Asked(Exception):
    """An op has come to its choice while `explain` asks for it: (its table, what it would choose for)."""


def public(function: Callable) -> Callable:
    """An op as users call it: `explain` finds it by its name, and autocast does not change what it computes."""
    op = in_the_widest(function)
    _public[function.__name__] = op
    return op


class use_backend:
    """Run every op on one backend from here on: "triton", "native" or "torch"; None goes back to choosing.

    `use_backend("native")` holds until the next call, inside a `with` to its end at most; `with use_backend("native"):`
    for its body. Both for the whole process, as a backward pass runs in threads of its own. Of bodies that overlap the
    one entered last counts. Raises ConfigError for another name; an op that cannot run there raises it, with the
    reason, when it is called.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ConfigError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
        self._name, self._around, self._mine = name, _bodies[-1], []
        self._before, self._around.name, self._around.by = self._around.name, name, self
        _settle()

    def __enter__(self) -> use_backend:
        if self._around.by is self:  # it was meant for the body alone
            self._around.name, self._around.by = self._before, None
        self._mine.append(_Body(self._name))
        _bodies.append(self._mine[-1])
        _settle()
        return self

    def __exit__(self, *error: object) -> None:
        _bodies.remove(self._mine.pop())
        _settle()


class _Body:
    """Where a backend was asked for: the process, or the body of a `with`; and the call that changed it last."""

    def __init__(self, name: str | None) -> None:
        self.name, self.by = name, None


_bodies = [_Body(None)]  # the process, and what is entered now


def _settle() -> None:
    global _forced
    _forced = _bodies[-1].name


def explain(op: str, *arguments: object, **keywords: object) -> dict[str, str]:
    """For each backend of `op`, first choice first: "chosen", "available", or the reason it cannot take `arguments`.

    Arguments are those of the op, and refused as the op refuses them; nothing is computed. Without arguments it tells
    what holds for every input on the GPU, or on the CPU where there is none. Raises ValueError for an op that does not
    exist.
    """
    if op not in _public:
        raise ValueError(f"{op!r} is not one of {', '.join(sorted(_public))}")
    if not arguments and not keywords:
        return installed(op, "cuda" if torch.cuda.is_available() else "cpu")
    thread = threading.get_ident()
    _asking.add(thread)
    try:
        _public[op](*arguments, **keywords)
    except _Asked as asked:
        table, given = asked.args
    finally:
        _asking.discard(thread)
    return _told({b: table.why_not(b, *given) for b in table.order})


def installed(op: str, device: str) -> dict[str, str]:
    """What `explain` says of every input on a `device`, "cpu" or "cuda": what is built, what hardware is there."""
    return _told({b: _not_installed(_ops[op], b, device) for b in _ops[op].order})


def _told(found: dict[str, str | None]) -> dict[str, str]:
    wanted = (_forced,) if _forced else tuple(b for b in found if not (b == "triton" and INTERPRETED))
    chosen = next((b for b in wanted if found[b] is None), None)
    return {b: reason or ("chosen" if b == chosen else "available") for b, reason in found.items()}


def forced() -> str | None:
    """The backend that `use_backend` or SPEEDK_BACKEND insists on, or None."""
    return _forced


def ops() -> list[str]:
    """The names of all ops that have a table."""
    return sorted(_ops)


def _not_installed(table: Op, backend: str, device: str) -> str | None:
    if backend not in table.backends:
        return f"there is no {backend} kernel of {table.name}"
    if backend == "triton":
        here = "cpu" if INTERPRETED else "cuda"
        return triton_missing() or (None if device == here else "the kernel is for the GPU")
    if backend == "native" and device == "cpu":
        return native_missing() or (None if table.cpu else "the kernel is for the GPU")
    if backend == "native":
        return native_missing() or ((native_cuda_missing() or gpu_too_old(_current_gpu())) if table.cuda
                                    else "the kernel is for the CPU")
    return None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_missing() -> str | None:
    """Why no Triton kernel runs here, or None. Under TRITON_INTERPRET=1 they run on the CPU, for tests."""
    if not _has_triton():
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU"
    return None


@functools.cache
def native() -> ModuleType | None:
    """The extension `speedk._native`, or None where it is not built."""
    if importlib.util.find_spec("speedk._native") is None:
        return None
    import speedk._native

    return speedk._native


@torch.compiler.assume_constant_result
def native_missing() -> str | None:
    """Why no native kernel runs here, or None."""
    return None if native() is not None else "the extension speedk._native is not built (see `make install`)"


CUDA_LAUNCHERS = {"freenet": "native_block", "mhsc": "native_linear", "patches": "native_linear"}
"""By the module of Triton's: where native kernels that are for the GPU alone are launched from."""


def launchers(backend: str, module: str, cuda: bool = False) -> ModuleType:
    """Where the kernels of `backend` are launched from: `speedk.kernels.<module>`, or `speedk.ops.native`, or with
    `cuda` the module that launches those for the GPU. Raises ValueError where `backend` has none."""
    if backend not in ("triton", "native"):
        raise ValueError(f"backend={backend!r} has no kernel of {module}")
    native_module = CUDA_LAUNCHERS[module] if cuda else "native"
    return importlib.import_module(f"speedk.kernels.{module}" if backend == "triton" else f"speedk.ops.{native_module}")


def way_back(backend: str, why_not_native: WhyNot, *arguments: object) -> str:
    """The backend of the gradients of an op that runs on `backend`: the CUDA kernel beside Triton's, which goes one way
    alone, where it takes the arguments and nobody insists on Triton. An argument of the registered op, so that what is
    compiled, and cached, for one choice is not taken for another."""
    return "native" if backend == "triton" and _forced is None and why_not_native(*arguments) is None else backend


def why_not_triton(*tensors: Tensor) -> str | None:
    """The part of a Triton backend's `why_not` that is the same for every op: hardware, devices, dtypes."""
    missing = triton_missing()
    if missing is not None:
        return missing
    for tensor in tensors:
        if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
            return f"a tensor is on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 is computed in PyTorch, in double"
    return None


def why_not_native_cpu(*tensors: Tensor) -> str | None:
    """The part of a native backend's `why_not` that is the same for every CPU op."""
    missing = native_missing()
    if missing is not None:
        return missing
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, the kernel is for the CPU"
    return None


def why_not_native_cuda(*tensors: Tensor) -> str | None:
    """The part of a native backend's `why_not` that is the same for every CUDA op."""
    missing = native_missing() or native_cuda_missing()
    if missing is not None:
        return missing
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"a tensor is on {tensor.device}, the kernel is for the GPU"
    return gpu_too_old(tensors[0].device.index) if tensors else None


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


LEAST_CAPABILITY = (8, 0)
"""Of the architectures that CMakeLists.txt builds for."""


@functools.cache
def _too_old(device: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY


@torch.compiler.assume_constant_result
def gpu_too_old(device: int) -> str | None:
    """Why no CUDA kernel of the extension runs on this GPU, or None; also where there is none to ask."""
    found = "the extension needs a GPU of compute capability {}.{} or later".format(*LEAST_CAPABILITY)
    return found if _too_old(device) else None


def why_not_native(*tensors: Tensor) -> str | None:
    """The same for an op with both, by where the first tensor is."""
    return (why_not_native_cuda if tensors[0].is_cuda else why_not_native_cpu)(*tensors)


@torch.compiler.assume_constant_result
def native_cuda() -> bool:
    """Whether the extension holds CUDA kernels, wherever they can run."""
    return native() is not None and native().cuda


def native_cuda_missing() -> str | None:
    """Why the extension runs nothing on a GPU, or None."""
    if native_cuda():
        return None
    return "the extension is built without its CUDA files (nvcc was not found, or SPEEDK_CUDA=OFF)"


def checks(check: bool | None, backend: str, tensor: Tensor) -> bool:
    """Whether an op looks for bad values (a NaN, an index out of range) in `tensor` and raises.

    As the caller says; by default wherever that costs no more than a glance. The native CPU kernels look anyway; the
    rest has to wait for the answer, which graphs and transforms cannot, and tensors without values never have. What
    PyTorch compiles cannot branch on a value either, whoever asks.
    """
    if backend == "torch" and torch.compiler.is_compiling():
        return False
    if check is not None:
        return check
    if backend == "native" and tensor.device.type == "cpu":
        return True
    if torch.compiler.is_compiling() or transformed():
        return False
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def batched(gradient: Tensor) -> bool:
    """Whether a backward pass runs for a batch of gradients at once: `is_grads_batched`, or vmap over autograd.grad."""
    return torch._C._functorch.is_batchedtensor(gradient) or torch._C._functorch.is_legacy_batchedtensor(gradient)


def gradients_in_torch(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function(*inputs)` by autograd: for a batch of d_out, where PyTorch takes a registered op apart
    by itself only if that has no list of tensors."""
    return torch.func.vjp(function, *(tensor.detach() for tensor in inputs))[1](d_out)


@torch.compiler.assume_constant_result
def _in_functorch() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def transformed() -> bool:
    """Under a functorch transform or forward-mode differentiation, where custom ops fail or return zeros."""
    return _in_functorch() or forward_ad._current_level >= 0


if os.environ.get("SPEEDK_BACKEND"):
    use_backend(os.environ["SPEEDK_BACKEND"])
