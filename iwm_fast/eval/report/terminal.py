"""An evaluation on the terminal: a table, and lines under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.eval.footnotes import data_lines
from iwm_fast.eval.report.drawing import Figure, drawings
from iwm_fast.file_names import printable

__all__ = ["result_lines", "result_rows"]


def result_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return table rows, one per metric: value, 95 % interval, chance, shuffled, neutral, untrained.

    Cells that do not apply are empty; the rest of ``results``, such as the protocol, is in JSON and report.
    """
    every = drawings()
    shown = [figure for drawing in every for figure in drawing.figures(results) if figure.name + figure.end in results]
    rows = [_row(results, figure) for figure in shown]
    return rows + [list(row) for drawing in every for row in drawing.rows(results)]


def _row(results: Mapping[str, Any], figure: Figure) -> list[str]:
    key = figure.name + figure.end
    low, high = results.get(f"{key}_interval") or (None, None)
    controls = (f"{figure.name}_{what}{figure.end}" for what in ("shuffled", "neutral", "untrained"))
    return [
        key,
        f"{results[key]:.4f}",
        "" if low is None else f"{low:.4f} – {high:.4f}",
        *(f"{results[beside]:.4f}" if beside in results else "" for beside in (f"{figure.name}_chance", *controls)),
    ]


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """Return lines: which images, what was left out, what did not run and why, and each evaluation's notes."""
    lines = [*data_lines(results)]
    lines += [printable(f"{measure} not run: {why}") for measure, why in results.get("not_run", {}).items()]
    return lines + [line for drawing in drawings() for line in drawing.lines(results)]
