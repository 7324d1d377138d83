"""When and on what the report's figures were measured: a line under each section, and a table of all that was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Self

from iwm_fast.eval.measurements import Measurement
from iwm_fast.eval.report.page import number, section, table

__all__ = ["Dated", "kept_table"]

_NAMES = {
    "mrr": "MRR",
    "knn": "k-NN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "equivariance": "equivariance",
    "rollout": "roll-out, error of the first step",
}


@dataclass(frozen=True)
class Dated:
    """The measurements of one checkpoint on one set of images, by measure.

    ``place``: of the images. ``number``: 0 for the images of the latest evaluation; sections of others name theirs.
    """

    place: str = ""
    number: int = 0
    dates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Sequence[Measurement], place: str, number: int = 0) -> Self:
        """Of those that were measured on ``place``."""
        return cls(place, number, {one.measure: one.date for one in measured if one.data == place})

    @property
    def end(self) -> str:
        """What makes the names of these charts unlike those of other sections: letters."""
        return "x" * self.number

    def title(self, text: str) -> str:
        """A section's title."""
        return f"{text}, on {PurePath(self.place).name or self.place}" if self.number else text

    def lines(self, *measures: str) -> list[str]:
        """When these were measured, and on what; nothing where that is not known."""
        when = {name: _when(self.dates[name]) for name in measures if name in self.dates}
        if not when:
            return []
        dates = ", ".join(dict.fromkeys(when.values()))
        if len(set(when.values())) > 1:
            dates = ", ".join(f"{_NAMES[name]} {date}" for name, date in when.items())
        return [f"Measured on {self.place}: {dates}."]


def kept_table(measured: Sequence[Measurement]) -> str:
    """A section with a row per measurement, the newest first; empty where there is none."""
    if not measured:
        return ""
    rows = [
        [
            _NAMES.get(one.measure, one.measure),
            *_figures(one),
            f"step {one.step}",
            PurePath(one.data).name or one.data,
            _when(one.date),
        ]
        for one in reversed(measured)
    ]
    head = ["", "value", "95 % interval", "chance", "checkpoint", "data", "measured"]
    places = dict.fromkeys(one.data for one in reversed(measured))
    note = "A measure that is taken again of the same checkpoint on the same data replaces its row. Data: "
    return section("All that was measured of this run", table(head, rows), note + "; ".join(places) + ".")


def _figures(one: Measurement) -> list[str]:
    """Value, interval and chance, empty where there is none."""
    results: Mapping[str, Any] = one.results
    if one.measure == "rollout":
        rolled = results["rollout"]
        value, interval = rolled["model"][0], rolled["model_interval"][0]
    else:
        value, interval = results[one.measure], results.get(f"{one.measure}_interval")
    chance = results.get(f"{one.measure}_chance")
    return [
        number(value),
        "" if interval is None else f"{number(interval[0])} – {number(interval[1])}",
        "" if chance is None else number(chance),
    ]


def _when(date: str) -> str:
    """2026-11-28 19:03 UTC of an ISO date in UTC."""
    return f"{date[:10]} {date[11:16]} UTC"
