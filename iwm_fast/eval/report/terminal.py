"""An evaluation on the terminal: a table, and lines under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.eval.footnotes import by_default_lines, data_lines
from iwm_fast.eval.report.drawing import Figure, drawings
from iwm_fast.eval.report.verdicts import verdict_lines
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
    key, form = figure.name + figure.end, figure.form
    ends = results.get(f"{key}_interval")
    controls = (f"{figure.name}_{what}{figure.end}" for what in ("shuffled", "neutral", "untrained"))
    return [
        figure.label,
        form(results[key]),
        f"{form(ends[0])} – {form(ends[1])}" if ends else "",
        *(form(results[beside]) if beside in results else "" for beside in (f"{figure.name}_chance", *controls)),
    ]


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """Return lines: verdicts, which images, what was left out, what did not run and why, each evaluation's notes."""
    lines = [*verdict_lines(results), *data_lines(results), *by_default_lines(results.get("not_by_default", ()))]
    lines += [printable(f"{measure} not run: {why}") for measure, why in results.get("not_run", {}).items()]
    return lines + [line for drawing in drawings() for line in drawing.lines(results)]
