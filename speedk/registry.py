"""Plug-ins by file: a name is the basename of a module in a folder, so adding a method is adding one file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from speedk.errors import ConfigError


def names(package: ModuleType) -> list[str]:
    """The plug-ins of `package`: its modules, but for `base` and those whose name opens with an underscore."""
    return _names(package.__path__)


def listed(package: str) -> list[str]:
    """`names` of the package of that name, which is not imported."""
    return _names(importlib.util.find_spec(package).submodule_search_locations)


def _names(folders: Iterable[str]) -> list[str]:
    found = (m.name for m in pkgutil.iter_modules(folders))
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
