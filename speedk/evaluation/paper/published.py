"""In what a measured cell is known to differ from the run whose number is printed in the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from speedk import registry
from speedk.distillation import coresets
from speedk.distillation import recipe as recipes
from speedk.distillation.objectives import dc

if TYPE_CHECKING:
    from speedk.evaluation.paper.tables import Target

RUNS = 5
"""Networks that each published number is the mean of."""

RATE = 0.01
"""They are trained at this, or where the objective is tm at the rate it learned."""


def resolved(target: Target, changed: Mapping[str, Any]) -> recipes.Recipe:
    """The recipe of a target that is one, with its own fields and then those that are `changed`."""
    return recipes.resolve(recipes.read(target.name), target.objective, {**dict(target.fields), **changed})


def settings(target: Target, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's run whose published values are known, as it has them; of any other run none."""
    if target.kind != "recipe":
        return {}
    recipe = resolved(target, changed)
    fields = dataclasses.asdict(recipe.parameterization) | dataclasses.asdict(recipe.objective)
    return {name: fields[name] for name in (*_published(target), "R") if name in fields}


def differences(target: Target, line: Mapping[str, Any]) -> list[str]:
    """In words, with what was published in brackets. `line` is of a results file; where it does not say the settings of
    its run, they are those of the recipe as it is now."""
    changed, published = line.get("changed", {}), _published(target)
    run = line["settings"] if "settings" in line else settings(target, changed)
    known = {*published, "split", "protocol"}
    if run.get("R") == 1:  # the two forms of the block are one function then
        published.pop("norm", None)
    found = _steps(line, published.pop("steps", line["steps_of"]))
    found += [_said(name, run[name], value) for name, value in published.items() if run.get(name, value) != value]
    if target.kind == "coreset" and not registry.find(coresets, target.name).looks_at:
        known.add("epochs")  # of the network that others look at the images with
    found += [f"{name}={value}" for name, value in changed.items() if name.rpartition(".")[2] not in known]
    split = "ilsvrc" if target.data.startswith("image") else "official"
    found += [_said("split", line["split"], split)] if line["split"] != split else []
    protocol, wanted = line["protocol"], "speed" if _method(target) == "speed" else "mtt"
    found += [_said("protocol", how, wanted)] if (how := protocol["standardisation"]) != wanted else []
    if protocol["name"] not in ("paper", "whole"):
        found.append(f"{protocol['epochs']:,} epochs of evaluation")
    if target.kind == "recipe" and target.objective != "tm" and protocol["rate"] != RATE:  # tm learns its rate
        found.append(f"evaluation at {_said('rate', protocol['rate'], RATE)}")
    if (precision := protocol.get("precision", "float32")) != "float32":
        found.append(f"evaluation in {precision}")
    if line["runs"] < RUNS:
        found.append("one network" if line["runs"] == 1 else f"{line['runs']} networks")
    return found + _ours(target)


def _published(target: Target) -> dict[str, Any]:
    """Field -> value, of SPEED's paper (init, sparse) and code (norm, standardise, the steps of tm), or of the paper
    that an objective comes from."""
    if target.kind != "recipe":
        return {}
    speed = _method(target) == "speed"
    own = {"init": "random", "sparse": "end", "norm": "sum"} if speed else {}
    if target.objective == "tm":
        return own | ({"steps": 20000, "standardise": True} if speed else {"steps": 5000})
    steps = 20000 if target.objective == "dm" else dc.original_steps(target.ipc)
    return own | {"steps": steps, "batch": 256}


def _ours(target: Target) -> list[str]:
    """Settings that are published nowhere, or not for this row, and so were chosen."""
    method, objective, subset = _method(target), target.objective, target.data.startswith("image")
    if target.kind == "whole":
        return ["training as chosen here: the paper's is not said"]
    if target.kind == "coreset":
        return ["greedy, as the paper's can hardly be"] if target.name == "kcenter" else []
    if method == "speed" and (objective != "tm" or (target.data, target.ipc) == ("tinyimagenet", 50)):
        return [f"settings of {objective} chosen here: none are published"]
    if objective == "tm" and method == "pixels" and subset and target.ipc > 1:
        return ["settings of tm chosen here, after the original's for 1 image"]
    if objective == "tm" and method == "pixels" and subset and target.data != "imagefruit":
        return ["settings of tm are the original's for ImageFruit"]
    if objective == "tm" and method == "pixels" and (target.data, target.ipc) in (("cifar10", 50), ("cifar100", 10)):
        return ["the original's tm goes without ZCA here"]
    return []


def _method(target: Target) -> str:
    return target.name.rpartition("-")[2] if target.kind == "recipe" else target.kind


def _steps(line: Mapping[str, Any], published: int) -> list[str]:
    done, of = line["steps"], line["steps_of"]
    if done == of == published:
        return []
    return [f"{done:,}{f' of {of:,}' if done < of else ''} steps{f' ({published:,})' if of != published else ''}"]


def _said(name: str, value: Any, published: Any) -> str:
    value, published = (str(v).lower() if isinstance(v, bool) else v for v in (value, published))
    return f"{name}={value} ({published})"
