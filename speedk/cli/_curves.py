"""Pictures of curves beside a report, and what earlier reports hold, to be drawn with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from speedk.errors import ConfigError, DataError
from speedk.files import write_atomic

T = TypeVar("T")


def draw(path: Path, picture: Callable[[], bytes]) -> None:
    """Write what `picture` draws as `path`; where matplotlib is absent say so, and go on."""
    try:
        content = picture()
    except ConfigError as error:
        print(error)
        return
    write_atomic(path, content)
    print(path)


def keep(out: Path) -> None:
    """Move an earlier report or picture out of the way: hours may have gone into it."""
    if out.exists():
        number = 1
        while (earlier := out.with_name(f"{out.stem}.{number}{out.suffix}")).exists():
            number += 1
        out.rename(earlier)
        print(f"\nthe earlier {'picture' if out.suffix == '.png' else 'report'} is now {earlier}")


def reports(paths: Sequence[Path], read: Callable[[dict[str, Any]], T]) -> list[tuple[str, T]]:
    """Of each JSON report in `paths` its source and what `read` finds in it. Raises DataError, one line."""
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_bytes())
            found.append((str(document["source"]), read(document)))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is not a report of what is to be drawn") from None
    return found


def titles(sources: Sequence[str]) -> list[str]:
    """A short name for each source, all different: of distilled files the folder they lie in."""
    short = [Path(s).parent.name or Path(s).stem if s.endswith(".safetensors") else s[:40] for s in sources]
    return short if len(set(short)) == len(short) else [f"{i + 1}: {name}" for i, name in enumerate(short)]
