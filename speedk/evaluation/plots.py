"""Curves as PNG, by matplotlib, which is imported here alone and may be absent."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from speedk.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 5.2  # inches of a panel
_DPI = 120


def polar(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """PNG of a polar picture (Figure 3 of the paper): a panel for each network, in it a closed curve for each source:
    name of the network -> name of the source -> corruption -> mean accuracy in per cent. All share one scale."""
    figure, colours = _figure(len(panels)), _colours(panels)
    top = max(value for panel in panels.values() for curve in panel.values() for value in curve.values())
    for place, (network, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1, projection="polar")
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        names = list(next(iter(curves.values())))
        angles = [2 * math.pi * i / len(names) for i in range(len(names))]
        for source, curve in curves.items():
            values = [curve[name] for name in names]
            axes.plot([*angles, angles[0]], [*values, values[0]], color=colours[source], linewidth=1.6, label=source)
            axes.fill(angles, values, color=colours[source], alpha=0.12)
        axes.set_xticks(angles, [])
        axes.set_ylim(0, 1.05 * top)
        for angle, name in zip(angles, names, strict=True):
            side = math.sin(angle)  # labels stand outside of the circle: beside it, or above and below
            axes.text(angle, (1.12 - 0.03 * abs(side)) * 1.05 * top, name.replace("_", "\n"), fontsize=8, va="center",
                      ha="center" if abs(side) < 0.3 else "left" if side > 0 else "right", linespacing=0.95)
        axes.tick_params(axis="y", labelsize=7, labelcolor="0.35")
        axes.grid(color="0.85", linewidth=0.6)
        axes.set_title(f"{network}, accuracy in per cent", fontsize=11, pad=34)
    return _png(figure)


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], x: str, y: str) -> bytes:
    """PNG of curves (Figure 2 of the paper): name of the panel -> name of the curve -> points (x, y, deviation). All
    share one scale."""
    figure, colours = _figure(len(panels)), _colours(panels)
    for place, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1, sharey=figure.axes[0] if place else None)
        for name, points in found.items():
            at, value, deviation = zip(*points, strict=True)
            axes.plot(at, value, color=colours[name], marker="o", markersize=4, linewidth=1.6, label=name)
            axes.fill_between(at, [v - d for v, d in zip(value, deviation)], [v + d for v, d in zip(value, deviation)],
                              color=colours[name], alpha=0.15, linewidth=0)
        axes.set_xticks(sorted({point[0] for points in found.values() for point in points}))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=11)
    return _png(figure)


def against(points: Mapping[str, Sequence[tuple[float, float, float, str]]], x: str, title: str) -> bytes:
    """PNG of accuracy against `x`: name of the curve -> points (x, accuracy, deviation, label)."""
    figure = _figure(1)
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes = figure.add_subplot()
    for name, found in points.items():
        numbers, accuracy, deviation, labels = zip(*sorted(found), strict=True)
        axes.errorbar(numbers, accuracy, deviation, marker="o", markersize=4, linewidth=1.4, capsize=2, label=name)
        for at, y, label in zip(numbers, accuracy, labels, strict=True):
            axes.annotate(label, (at, y), textcoords="offset points", xytext=(4, 5), fontsize=7, color="0.35")
    everything = [point[0] for found in points.values() for point in found]
    if max(everything) > 3 * min(everything) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(value == int(value) for value in everything)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:g}")
    axes.margins(x=0.12)
    axes.set_xlabel(x)
    axes.set_ylabel("accuracy in per cent")
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    return _png(figure)


def _figure(panels: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('no picture is drawn without matplotlib: pip install "speedk[plots]"') from None
    return Figure(figsize=(_SIDE * panels, _SIDE + 0.6), dpi=_DPI, layout="constrained")


def _colours(panels: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """One for each curve of a name, whichever panels it is in."""
    names = dict.fromkeys(name for found in panels.values() for name in found)
    return {name: f"C{i}" for i, name in enumerate(names)}


def _png(figure: Figure) -> bytes:
    """The figure with one legend of all panels below them; equal figures give equal bytes."""
    curves: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            curves.setdefault(name, handle)
    labels, handles = list(curves), list(curves.values())
    entry = 0.6 + 0.08 * max(map(len, labels), default=0)  # inches: the line, and letters of 9 points
    columns = max(1, min(3, len(labels), int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None}, bbox_inches="tight")  # a long name is not cut
    return stream.getvalue()
