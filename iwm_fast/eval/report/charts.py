"""Charts of the report as inline SVG: transparent, and coloured by the page's own text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Bar", "Line", "Place", "bars", "curve", "lines", "overlaid", "places", "tracks"]

# A unique colour: it becomes currentColor in the page, so axes and words follow light and dark mode.
_INK = "#010203"
# Of medium lightness, distinguishable on white and on near-black.
_COLOURS = ("#3b86c6", "#d9822b", "#3a9d6a", "#a15fb8", "#8a919b")
_SIZE = (4.0, 2.5)  # inches, or 288 points: shown on about 330 pixels, nine-point words are read with ease


@dataclass(frozen=True)
class Bar:
    """A bar with its name and the ends of its interval, if any."""

    name: str
    value: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Place:
    """A point with its name and the ends of its horizontal and vertical intervals."""

    name: str
    x: float
    y: float
    x_interval: Sequence[float]
    y_interval: Sequence[float]


@dataclass(frozen=True)
class Line:
    """A line with its name and the ends of its interval at each position."""

    name: str
    values: Sequence[float]
    intervals: Sequence[Sequence[float]]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for patch in (figure.patch, axes.patch):
        patch.set_visible(False)  # the page shows through
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element that fills its container's width and keeps its proportions."""
    text = io.StringIO()
    # A fixed salt makes the identifiers, and so the text, reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Every chart has a figure_1: a prefix keeps the charts of one page from clipping each other.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}_", svg)
    svg = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    return svg.replace(_INK, "currentColor")


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of records that have a number under the key."""
    pairs = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def curve(
    records: Sequence[Mapping[str, Any]], keys: Mapping[str, str], *, name: str, label: str, chance: float | None = None
) -> str | None:
    """Plot the ``keys`` (record key -> name in the legend) over the step; return None if no record has one of them.

    ``name`` is unique on the page and made of letters; ``label`` is plain text without quotes or angle brackets.
    """
    series = {legend: _series(records, key) for key, legend in keys.items()}
    series = {legend: pair for legend, pair in series.items() if pair[0]}
    if not series:
        return None
    figure, axes = _figure()
    for colour, (legend, (steps, values)) in zip(_COLOURS, series.items(), strict=False):
        few = len(steps) < 30  # one or two points would not show as a line
        axes.plot(steps, values, color=colour, linewidth=1.6, label=legend, marker="o" if few else None, markersize=3)
    if chance is not None:
        axes.axhline(chance, color=_INK, alpha=0.6, linestyle="--", linewidth=1, label="chance")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.margins(x=0.01)
    if len(series) > 1 or chance is not None:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    return _svg(figure, name, f"{label} over the steps of training")


def lines(places: Sequence[int], values: Sequence[Line], *, name: str, across: str, label: str) -> str:
    """Plot lines over integers, each with the band of its interval."""
    figure, axes = _figure()
    for colour, line in zip(_COLOURS, values, strict=False):
        low, high = zip(*line.intervals, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(places, line.values, color=colour, linewidth=1.6, label=line.name, marker="o", markersize=3)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.set_xticks(places)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    return _svg(figure, name, f"{label} over the {across}")


def tracks(
    seen: Sequence[float], foreseen: Mapping[int, Sequence[float]], *, name: str, across: str, label: str
) -> str:
    """Plot what was seen from position 0 on, and for each position what was then foreseen: a line from what was seen
    there on.
    """
    figure, axes = _figure()
    for number, (place, values) in enumerate(foreseen.items()):
        ahead = [seen[place], *values]
        told = "foreseen" if number == 0 else None
        axes.plot(range(place, place + len(ahead)), ahead, color=_COLOURS[1], linewidth=0.9, alpha=0.8, label=told)
    axes.plot(range(len(seen)), seen, color=_COLOURS[0], linewidth=1.8, label="seen", marker="o", markersize=3)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    return _svg(figure, name, f"{label} over the {across}")


def bars(values: Sequence[Bar], *, name: str, label: str) -> str:
    """Plot horizontal bars from the top down, each with its value and interval; the first one is emphasised."""
    figure, axes = _figure()
    axes.grid(visible=False)
    places = list(range(len(values)))
    colours = [_COLOURS[0]] + [_COLOURS[-1]] * (len(values) - 1)
    axes.barh(places, [bar.value for bar in values], color=colours, height=0.66)
    reach = max(max(bar.value, bar.interval[1] if bar.interval else 0) for bar in values)
    for place, bar in zip(places, values, strict=True):
        end = bar.value
        if bar.interval is not None:
            axes.plot(bar.interval, [place, place], color=_INK, linewidth=1.2, solid_capstyle="butt")
            end = max(end, bar.interval[1])
        axes.text(end + 0.015 * reach, place, f"{bar.value:.3f}", color=_INK, va="center", fontsize=9)
    axes.set_yticks(places, [bar.name for bar in values])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * reach or 1)
    axes.set_xlabel(label, color=_INK)
    axes.tick_params(axis="y", length=0)
    return _svg(figure, name, label)


def places(points: Sequence[Place], *, name: str, x_label: str, y_label: str) -> str:
    """Plot points between 0 and 1 on both axes, with their intervals; the first one is emphasised."""
    figure, axes = _figure()
    axes.grid(axis="x", color=_INK, alpha=0.15, linewidth=0.6)
    for number, point in enumerate(points):
        colour = _COLOURS[0] if number == 0 else _COLOURS[-1]
        axes.plot(point.x_interval, [point.y, point.y], color=colour, linewidth=1.4)
        axes.plot([point.x, point.x], point.y_interval, color=colour, linewidth=1.4)
        axes.plot(point.x, point.y, "o", color=colour, markersize=7 if number == 0 else 5, label=point.name)
    axes.set_xlim(min(0.0, *(point.x for point in points)), 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)  # labels beside close points would overlap
    return _svg(figure, name, f"{y_label} against {x_label}")


def overlaid(
    named: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, name: str, across: str, label: str
) -> str:
    """Lines of several runs: (name, places, values) each. One without points has none, and keeps its colour from the
    others: with more lines than colours these come again dashed.
    """
    figure, axes = _figure()
    for number, (legend, xs, ys) in enumerate(named):
        if not xs:
            continue
        style = ("-", "--", ":", "-.")[number // len(_COLOURS) % 4]
        few = len(xs) < 30  # as in `curve`
        shown = legend if len(legend) <= 28 else f"…{legend[-27:]}"
        axes.plot(xs, ys, style, color=_COLOURS[number % len(_COLOURS)], linewidth=1.4, label=_plain(shown),
                  marker="o" if few else None, markersize=3)  # fmt: skip
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=_INK, fontsize=8)
    return _svg(figure, name, f"{label} over {across}")


def _plain(text: str) -> str:
    """A name for a legend: matplotlib leaves out one that begins with an underscore, and sets $...$ as mathematics."""
    return f"\N{WORD JOINER}{text}".replace("$", r"\$")
