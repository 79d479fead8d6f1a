"""Recipes: TOML files that say everything a run depends on, read into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from speedk import registry
from speedk.data import catalogue, listed
from speedk.distillation import objectives, parameterizations
from speedk.distillation.budget import Budget
from speedk.errors import ConfigError
from speedk.geometry import Geometry
from speedk.schedule import STANDARDISATIONS
from speedk.toml import tomllib

MAX_SEED = (1 << 64) - 1
"""What a file can say: a run with a larger one would end with nothing written."""


@dataclass(frozen=True)
class About:
    """Where a recipe comes from. row: of which paper and table, or "ours"; published: its accuracy, in words."""

    name: str = "custom"
    row: str = "ours"
    published: str = ""


@dataclass(frozen=True)
class DataFields:
    """name: of the catalogue, or "" for a folder. ipc: images per class that the storage may equal. budget: "on", or
    "off" to let an ablation exceed it. resolution (pixels), normaliser and split: 0 and "" mean the data set's own.
    classes: "dog,3,10-12", by name or number: these alone, and the budget theirs; "" is all."""

    name: str = ""
    ipc: int = 1
    budget: str = "on"
    resolution: int = 0
    normaliser: str = ""
    split: str = ""
    classes: str = ""


@dataclass(frozen=True)
class RunFields:
    """seed: of everything random. protocol: of evaluation, "mtt", or "speed" with per-batch standardisation, which an
    objective may follow (`ObjectiveSpec.defaults`). preview_every: steps between pictures, 0 for one at the end only.
    """

    seed: int = 0
    protocol: str = "mtt"
    preview_every: int = 200


@dataclass(frozen=True)
class Recipe:
    """A run, resolved: nothing is left to defaults that could change."""

    about: About
    data: DataFields
    method: str
    parameterization: Any
    objective_name: str
    objective: Any
    run: RunFields = field(default_factory=RunFields)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, in the layout of the file."""
        return {
            "recipe": dataclasses.asdict(self.about),
            # Where all classes are taken nothing says so: runs and files are then those of before there was the field.
            "data": {k: v for k, v in dataclasses.asdict(self.data).items() if (k, v) != ("classes", "")},
            "parameterization": {"method": self.method, **dataclasses.asdict(self.parameterization)},
            "objective": {"name": self.objective_name, **dataclasses.asdict(self.objective)},
            "run": dataclasses.asdict(self.run),
        }

    def portable(self) -> dict[str, Any]:
        """`to_dict` without the places on this machine that the objective reads from."""
        tables = self.to_dict()
        tables["objective"] |= dict.fromkeys(self.objective.LOCAL, "")
        return tables

    def budget(self, geometry: Geometry) -> Budget:
        """The split of the storage. Raises ConfigError where the method's fields cannot be with images of `geometry`,
        or store too much, unless data.budget is "off"."""
        self.parameterization.check(geometry)
        plugin = registry.find(parameterizations, self.method)
        budget = Budget(plugin.planned_storage(self.parameterization, geometry, self.data.ipc),
                        geometry.budget(self.data.ipc))
        if self.data.budget != "off":
            budget.check()
        return budget


def build(spec_class: type, values: dict[str, Any], where: str) -> Any:
    """An instance of the dataclass `spec_class` from JSON or TOML values, with each name and type checked."""
    fields = {f.name: f for f in dataclasses.fields(spec_class)}
    hints = typing.get_type_hints(spec_class)
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where} has no field {name!r}{registry.nearest(name, list(fields))}")
    for name, spec_field in fields.items():
        required = spec_field.default is dataclasses.MISSING and spec_field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} lacks the field {name!r}")
    return spec_class(**{name: _coerce(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, not {value!r}")
        return {str(key): _coerce(item, typing.get_args(hint)[1], f"{where}.{key}") for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, typing.get_args(hint)[0], where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}={value!r} must be {_KINDS[hint]}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r} must be finite")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """["k=24", "rates.scm=0.1"] -> {"k": 24, "rates.scm": 0.1}; a value is read as TOML, or else as a string."""
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r} is not key=value")
        if key in values:
            raise ConfigError(f"{key} is given twice")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


def read(source: str | Path) -> dict[str, Any]:
    """The tables of a recipe by its name in the package, or of a TOML file."""
    text = shipped().get(str(source))
    if text is None:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"no recipe {str(source)!r}: neither a file nor one of `speedk recipes`"
                              f"{registry.nearest(str(source), list(shipped()))}")
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: {name} is no table, and a recipe holds only tables, as [{name}]")
    return tables


@cache
def shipped() -> dict[str, str]:
    """The recipes of the package: name -> text."""
    folder = resources.files("speedk") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in files}


def find_row(dataset: str, ipc: int, method: str) -> str | None:
    """The name of the shipped recipe of a data set at its own resolution, images per class and method, or None."""
    for name, text in shipped().items():
        tables = tomllib.loads(text)
        data = tables.get("data", {})
        row = data.get("name"), data.get("ipc", 1), tables["parameterization"]["method"]
        if "resolution" not in data and row == (dataset, ipc, method):
            return name
    return None


def geometry(recipe: Recipe) -> Geometry:
    """Of the named data set that `recipe` is for, at the recipe's resolution."""
    own = catalogue.entry(recipe.data.name).geometry
    return dataclasses.replace(own, resolution=recipe.data.resolution or own.resolution,
                               classes=len(listed(recipe.data.classes)) or own.classes)


def resolve(tables: dict[str, Any], objective: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe from its tables, for one objective, with `key=value` changes applied.

    [objective.NAME] holds the fields of the objective NAME; one file may have several. A key of `overrides` is a field
    ("k") where only one table has it, else "table.field" ("objective.batch").
    """
    known = ("recipe", "data", "parameterization", "objective", "run")
    for name, table in tables.items():
        if name not in known:
            raise ConfigError(f"a recipe has no table [{name}]{registry.nearest(name, list(known))}")
        if name == "objective" and not all(isinstance(inner, dict) for inner in table.values()):
            raise ConfigError("[objective] holds fields: they belong to a table for each, [objective.dm]")
    parameters = dict(tables.get("parameterization", {}))
    method = parameters.pop("method", None)
    if not isinstance(method, str):
        raise ConfigError("[parameterization] lacks method = \"...\"")
    plugins = {"parameterization": registry.find(parameterizations, method),
               "objective": registry.find(objectives, objective)}
    chosen = {
        "data": dict(tables.get("data", {})),
        "parameterization": parameters,
        "objective": dict(tables.get("objective", {}).get(objective, {})),
        "run": dict(tables.get("run", {})),
    }
    classes = {"data": DataFields, "parameterization": plugins["parameterization"].Spec,
               "objective": plugins["objective"].Spec, "run": RunFields}
    for key, value in (overrides or {}).items():
        _override(chosen, classes, key, value)
    chosen["objective"] = classes["objective"].defaults(chosen["run"].get("protocol")) | chosen["objective"]
    built = {name: build(classes[name], chosen[name], name) for name in classes}
    about = build(About, dict(tables.get("recipe", {})), "recipe")
    recipe = Recipe(about, built["data"], method, built["parameterization"], objective, built["objective"],
                    built["run"])
    _check(recipe)
    return recipe


def _override(chosen: dict[str, dict], classes: dict[str, type], key: str, value: Any) -> None:
    table, _, rest = key.partition(".")
    if table not in classes:
        rest = key
        head = key.partition(".")[0]
        owners = [name for name, spec in classes.items() if head in {f.name for f in dataclasses.fields(spec)}]
        if len(owners) != 1:
            fields = [f.name for spec in classes.values() for f in dataclasses.fields(spec)]
            raise ConfigError(f"no recipe field {head!r}{registry.nearest(head, fields)}" if not owners else
                              f"{head!r} is a field of {' and '.join(owners)}: say {owners[0]}.{key}=...")
        table = owners[0]
    target, parts = chosen[table], rest.split(".")
    for part in parts[:-1]:
        inner = target.get(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{table}.{part}={inner!r} is no table: there is no {key!r}")
        target[part] = dict(inner)
        target = target[part]
    target[parts[-1]] = value


def _check(recipe: Recipe) -> None:
    recipe.objective.check()
    if recipe.data.ipc < 1:
        raise ConfigError(f"ipc={recipe.data.ipc} must be at least 1")
    if not 0 <= recipe.run.seed <= MAX_SEED:
        raise ConfigError(f"seed={recipe.run.seed} is not from 0 to {MAX_SEED:,}")
    if recipe.data.budget not in ("on", "off"):
        raise ConfigError(f"budget={recipe.data.budget!r} must be on or off")
    if recipe.run.protocol not in STANDARDISATIONS:
        raise ConfigError(f"protocol={recipe.run.protocol!r} is not one of {', '.join(STANDARDISATIONS)}")
    if recipe.run.preview_every < 0:
        raise ConfigError(f"preview_every={recipe.run.preview_every} must not be negative")


def to_toml(tables: dict[str, Any]) -> str:
    """TOML of `Recipe.to_dict`, readable by `from_resolved`."""
    lines = []
    for name, values in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        # JSON's escapes are TOML's, which wants this one besides.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def from_resolved(tables: dict[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`: of a run's recipe.toml or an artifact's header."""
    objective = dict(tables.get("objective", {}))
    name = objective.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("[objective] lacks name = \"...\"")
    return resolve({**tables, "objective": {name: objective}}, name)
