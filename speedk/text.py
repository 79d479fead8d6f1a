"""Tables, durations, bars and results as text."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows in columns two spaces apart; those whose place is in `numbers` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """'1 epoch', '2 epochs'."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds in a unit that fits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def no_bar(progress: bool | None) -> bool | None:
    """What tqdm's `disable` must be for a bar where `progress` says so; None shows it on a terminal."""
    return None if progress is None else not progress


def mean_std(mean: float | None, std: float | None, runs: int, digits: int = 2, sign: str = " +- ") -> str:
    """Mean and standard deviation of `runs` runs. One run has no deviation, and there is no mean where one failed."""
    if mean is None:
        return "failed"
    return f"{mean:.{digits}f}" + (f"{sign}{std:.{digits}f}" if runs > 1 else " (one run)")
