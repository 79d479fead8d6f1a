"""Plug-ins by file: a name is the basename of a module in a folder, so adding a method is adding one file.

The folder's package says in `INTERFACE` what class its plug-ins extend. That class says in `REQUIRED`, if it has it,
what each of them must have of its own, and in `Spec` what their recipe fields extend.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from speedk.errors import ConfigError


def names(package: ModuleType) -> list[str]:
    """The plug-ins of `package`: its modules, but for `base` and those whose name opens with an underscore."""
    return _names(package.__path__)


def listed(package: str) -> list[str]:
    """`names` of the package of that name, which is not imported."""
    return _names(importlib.util.find_spec(package).submodule_search_locations)


def described(package: str) -> list[tuple[str, str]]:
    """The plug-ins of the package of that name, each with the first line of its file's docstring; none is imported."""
    found = []
    for name in listed(package):
        files = [Path(folder) / f"{name}.py" for folder in importlib.util.find_spec(package).submodule_search_locations]
        lines = [file.read_text(encoding="utf-8").partition("\n")[0] for file in files if file.is_file()]
        found.append((name, lines[0].strip('"') if lines and lines[0].startswith('"""') else ""))
    return found


def _names(folders: Iterable[str]) -> list[str]:
    found = (m.name for m in pkgutil.iter_modules(folders))
    return sorted(n for n in found if n != "base" and not n.startswith("_"))


def find(package: ModuleType, name: str) -> type:
    """The class that the module `name` of `package` names as its `PLUGIN`. Raises ConfigError where there is no such
    module, or the class is not what the package's `INTERFACE` asks for."""
    known = names(package)
    if name not in known:
        raise ConfigError(f"{name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    plugin = getattr(module, "PLUGIN", None)
    if wrong := _wrong(plugin, name, package.INTERFACE):
        raise ConfigError(f"{module.__file__} {wrong}")
    return plugin


def _wrong(plugin: object, name: str, interface: type) -> str:
    """What keeps `plugin` from being used as the plug-in `name`, or ""."""
    if not isinstance(plugin, type) or not issubclass(plugin, interface):
        return f"has no PLUGIN that is a subclass of {interface.__name__}"
    own = {key for kind in plugin.__mro__ if kind not in interface.__mro__ for key in vars(kind)}
    required = getattr(interface, "REQUIRED", ())
    if missing := [key for key in required if key not in own]:
        return f"has a PLUGIN, {plugin.__name__}, that lacks {', '.join(missing)}"
    if "name" in required and plugin.name != name:
        return f"has a PLUGIN with name = {plugin.name!r}, but a file's name is the plug-in's: {name!r}"
    fields = getattr(interface, "Spec", None)
    if fields and not (issubclass(plugin.Spec, fields) and "__dataclass_fields__" in vars(plugin.Spec)):
        return f"has a Spec that is no dataclass extending {fields.__name__}"
    return ""


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
