"""speedk recipes: the recipes that come with the package."""

from __future__ import annotations

import argparse

from speedk.text import table

HELP = "List the recipes that come with speedk, or print one."
EPILOG = """\
examples:
  speedk recipes
  speedk recipes show cifar10-ipc1-speed > mine.toml
  speedk distill --recipe mine.toml --data DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list", help="default: list")
    parser.add_argument("name", metavar="NAME", nargs="?", help="the recipe to show")


def run(args: argparse.Namespace) -> int:
    from speedk.distillation import recipe as recipes
    from speedk.errors import ConfigError
    from speedk.registry import nearest

    shipped = recipes.shipped()
    if args.action == "show":
        if args.name is None:
            raise ConfigError("say which: speedk recipes show NAME")
        if args.name not in shipped:
            raise ConfigError(f"no recipe {args.name!r}{nearest(args.name, list(shipped))}")
        print(shipped[args.name], end="")
        return 0
    if args.name is not None:
        raise ConfigError(f"list takes no name: speedk recipes show {args.name} prints that recipe")
    rows = [("recipe", "data", "ipc", "method", "objectives", "N/c", "counted", "budget",
             "published accuracy (per cent)")]
    rows += [_row(name) for name in shipped]
    print(table(rows, numbers=(2, 5, 6, 7)))
    return 0


def _row(name: str) -> tuple[str, ...]:
    from speedk.distillation import recipe as recipes

    tables = recipes.read(name)
    resolved = recipes.resolve(tables, "dm")
    spent = resolved.budget(recipes.geometry(resolved))
    images = getattr(resolved.parameterization, "images_per_class", resolved.data.ipc)
    side = f" at {resolved.data.resolution}" if resolved.data.resolution else ""
    ours = "settings ours" if "ours" in resolved.about.row else ""
    return (name, resolved.data.name + side, str(resolved.data.ipc), resolved.method,
            " ".join(sorted(tables["objective"])), str(images), f"{spent.counted:,.0f}", f"{spent.allowed:,}",
            "; ".join(filter(None, (resolved.about.published, ours))) or "-")
