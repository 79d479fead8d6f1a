"""speedk: dataset distillation by sparse parameterization (SPEED, NeurIPS 2023).

    import speedk
    distilled = speedk.load("runs/digits/distilled.safetensors")
    images, labels = distilled.images(), distilled.labels

Nothing heavy is imported until one of the names below is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedk import errors as errors
    from speedk import ops as ops
    from speedk.distillation.artifact import load as load
    from speedk.distillation.freenet import FReeNet as FReeNet
    from speedk.distillation.plan import distill as distill
    from speedk.distillation.unroll import unroll as unroll
    from speedk.evaluation import evaluate as evaluate
    from speedk.ops import explain as explain
    from speedk.ops import use_backend as use_backend

__version__ = "0.1.0"

_HOMES = {
    "distill": "speedk.distillation.plan",
    "evaluate": "speedk.evaluation",
    "load": "speedk.distillation.artifact",
    "FReeNet": "speedk.distillation.freenet",
    "unroll": "speedk.distillation.unroll",
    "explain": "speedk.ops",
    "use_backend": "speedk.ops",
}
_MODULES = ("errors", "ops")
__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
