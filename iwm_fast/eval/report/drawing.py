"""How evaluations are shown: figures and lines on a terminal, a section of the page, a row of the table of all."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iwm_fast.eval.registry import Evaluation, evaluations
from iwm_fast.eval.report.page import Section, Table, number

if TYPE_CHECKING:
    from iwm_fast.eval.report.dates import Dated

__all__ = ["Drawing", "Figure", "Headline", "drawing_of", "drawings", "interval"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A row of the terminal's table: results[name + end] with its interval.

    Further columns: NAME_chance, and NAME_shuffled, NAME_neutral and NAME_untrained with the same ``end``.
    """

    name: str
    end: str = ""
    title: str = ""
    form: Callable[[float], str] = number

    @property
    def label(self) -> str:
        """What the row is called."""
        return self.title or self.name + self.end


@dataclass(frozen=True)
class Headline:
    """The one figure of a measurement in the table of all."""

    value: float
    interval: Sequence[float] | None = None
    chance: float | None = None


class Drawing:
    """How one evaluation is shown, or several that share a section.

    The default suits an evaluation of one number: NAME with NAME_interval and, if present, NAME_chance, NAME_untrained
    with its interval, and NAME_protocol, a text. Subclasses override what differs.
    """

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self.evaluations = tuple(evaluations)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its evaluations."""
        return tuple(one.name for one in self.evaluations)

    def figures(self, results: Results) -> Sequence[Figure]:
        """Return the terminal table's figures that results have."""
        del results
        return [Figure(one.name, title=one.title) for one in self.evaluations]

    def rows(self, results: Results) -> Sequence[Sequence[str]]:
        """Return rows below all figures, with the same columns."""
        del results
        return []

    def lines(self, results: Results) -> Sequence[str]:
        """Return lines under the terminal's table."""
        del results
        return []

    def headline(self, name: str, results: Results) -> Headline:
        """Return the headline of the evaluation ``name``, which results have."""
        return Headline(results[name], results.get(f"{name}_interval"), results.get(f"{name}_chance"))

    def section(self, results: Results, said: Dated) -> Section | None:
        """Return the section of the page, or None if nothing of it was measured. ``said``: when and on what."""
        here = [one for one in self.evaluations if one.name in results]
        if not here:
            return None
        rows = []
        for one in here:
            chance = results.get(f"{one.name}_chance")
            cells = [number(results[one.name]), interval(results, one.name), "" if chance is None else number(chance)]
            other = results.get(f"{one.name}_untrained")
            cells += ["" if other is None else number(other), interval(results, f"{one.name}_untrained")]
            rows.append([one.title, *cells])
        table = Table(["", "value", "95 % interval", "chance", "untrained", "95 % interval"], rows)
        protocols = [results[f"{one.name}_protocol"] for one in here if f"{one.name}_protocol" in results]
        return Section(said.title(here[0].title), [table], [*protocols, *said.lines(*self.names)])


def interval(results: Results, key: str, form: Callable[[float], str] = number) -> str:
    """Format the interval of a key, empty if there is none."""
    ends = results.get(f"{key}_interval")
    return f"{form(ends[0])} – {form(ends[1])}" if ends else ""


def drawings() -> list[Drawing]:
    """Return the drawings of all evaluations, in order; those that name the same drawing share one."""
    shared: dict[Any, list[Evaluation]] = {}
    for one in evaluations():
        shared.setdefault(one.name if one.drawing is None else one.drawing, []).append(one)
    return [_drawing(members) for members in shared.values()]


def drawing_of(name: str) -> Drawing:
    """Return the drawing of the evaluation ``name``, or of one that is no longer in the table."""
    found = [drawing for drawing in drawings() if name in drawing.names]
    return found[0] if found else Drawing(())


def _drawing(members: Sequence[Evaluation]) -> Drawing:
    chosen = members[0].drawing
    kind = pkgutil.resolve_name(chosen) if isinstance(chosen, str) else chosen or Drawing
    made: Drawing = kind(members)
    return made
