"""Plug-ins by file: a name is the basename of a module in a folder, so adding a method is adding one file."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from speedk.errors import ConfigError


def names(package: ModuleType) -> list[str]:
    """The plug-ins of `package`: its modules, but for `base` and those whose name opens with an underscore."""
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in found if n != "base" and not n.startswith("_"))


def find(package: ModuleType, name: str) -> type:
    """The class that the module `name` of `package` names as its `PLUGIN`."""
    known = names(package)
    if name not in known:
        raise ConfigError(f"{name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    return importlib.import_module(f"{package.__name__}.{name}").PLUGIN


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
