"""Date and data of the report's metrics: a line under each section, and a table of all measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Self

from iwm_fast.eval.measurements import Measurement
from iwm_fast.eval.registry import evaluation
from iwm_fast.eval.report.drawing import drawing_of
from iwm_fast.eval.report.page import Section, Table, number

__all__ = ["Dated", "kept_table"]


@dataclass(frozen=True)
class Dated:
    """The measurements of one checkpoint on one set of images, by evaluation.

    ``place``: of the images. ``number``: 0 for the images of the latest evaluation; sections of others name theirs.
    """

    place: str = ""
    number: int = 0
    dates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Sequence[Measurement], place: str, number: int = 0) -> Self:
        """Return those on ``place``."""
        return cls(place, number, {one.measure: one.date for one in measured if one.data == place})

    @property
    def end(self) -> str:
        """A suffix of letters that makes these charts' names unique."""
        return "x" * self.number

    def title(self, text: str) -> str:
        """Return a section's title."""
        return f"{text}, on {PurePath(self.place).name or self.place}" if self.number else text

    def lines(self, *measures: str) -> list[str]:
        """Return when these were measured, and on what; nothing if unknown."""
        when = {name: _when(self.dates[name]) for name in measures if name in self.dates}
        if not when:
            return []
        dates = ", ".join(dict.fromkeys(when.values()))
        if len(set(when.values())) > 1:
            dates = ", ".join(f"{_title(name)} {date}" for name, date in when.items())
        return [f"Measured on {self.place}: {dates}."]


def kept_table(measured: Sequence[Measurement]) -> list[Section]:
    """Return a section with one row per measurement, newest first; none without measurements."""
    if not measured:
        return []
    rows = [
        [
            _title(one.measure),
            *_figures(one),
            f"step {one.step}",
            PurePath(one.data).name or one.data,
            _when(one.date),
        ]
        for one in reversed(measured)
    ]
    head = ["", "value", "95 % interval", "chance", "checkpoint", "data", "measured"]
    places = dict.fromkeys(one.data for one in reversed(measured))
    note = "Repeating an evaluation of the same checkpoint on the same data replaces its row. Data: "
    return [Section("All evaluations of this run", [Table(head, rows)], [note + "; ".join(places) + "."])]


def _figures(one: Measurement) -> list[str]:
    """Return value, interval and chance, empty if there is none."""
    found = drawing_of(one.measure).headline(one.measure, one.results)
    ends = found.interval
    return [
        number(found.value),
        "" if ends is None else f"{number(ends[0])} – {number(ends[1])}",
        "" if found.chance is None else number(found.chance),
    ]


def _title(measure: str) -> str:
    entry = evaluation(measure)
    return measure if entry is None else entry.title


def _when(date: str) -> str:
    """Format an ISO date in UTC as 2026-11-28 19:03 UTC."""
    return f"{date[:10]} {date[11:16]} UTC"
