"""How evaluations are shown: figures and lines on a terminal, a section of the page, a row of all that was measured."""

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

    Beside it stand NAME_chance, and NAME_shuffled, NAME_neutral and NAME_untrained with the same ``end``.
    """

    name: str
    end: str = ""


@dataclass(frozen=True)
class Headline:
    """The one figure by which a measurement stands in the table of all."""

    value: float
    interval: Sequence[float] | None = None
    chance: float | None = None


class Drawing:
    """How one evaluation is shown, or several that share a section.

    As it stands it suits an evaluation of one number: NAME with NAME_interval, and where there are such NAME_chance,
    NAME_untrained with its interval, and NAME_protocol, a text. Others override what differs.
    """

    def __init__(self, evaluations: Sequence[Evaluation]) -> None:
        self.evaluations = tuple(evaluations)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its evaluations."""
        return tuple(one.name for one in self.evaluations)

    def figures(self, results: Results) -> Sequence[Figure]:
        """What the terminal's table shows of results, where they have it."""
        del results
        return [Figure(name) for name in self.names]

    def rows(self, results: Results) -> Sequence[Sequence[str]]:
        """Rows below all figures, of the same columns."""
        del results
        return []

    def lines(self, results: Results) -> Sequence[str]:
        """Lines under the terminal's table."""
        del results
        return []

    def headline(self, name: str, results: Results) -> Headline:
        """Of the evaluation ``name``, which results have."""
        return Headline(results[name], results.get(f"{name}_interval"), results.get(f"{name}_chance"))

    def section(self, results: Results, said: Dated) -> Section | None:
        """The section of the page, None where nothing of it was measured. ``said``: when and on what."""
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
    """The interval of a key in words, empty where there is none."""
    ends = results.get(f"{key}_interval")
    return f"{form(ends[0])} – {form(ends[1])}" if ends else ""


def drawings() -> list[Drawing]:
    """Of all evaluations, in their order; those that name the same drawing share one."""
    shared: dict[Any, list[Evaluation]] = {}
    for one in evaluations():
        shared.setdefault(one.name if one.drawing is None else one.drawing, []).append(one)
    return [_drawing(members) for members in shared.values()]


def drawing_of(name: str) -> Drawing:
    """Of the evaluation ``name``, or of one that is in no table any more."""
    found = [drawing for drawing in drawings() if name in drawing.names]
    return found[0] if found else Drawing(())


def _drawing(members: Sequence[Evaluation]) -> Drawing:
    chosen = members[0].drawing
    kind = pkgutil.resolve_name(chosen) if isinstance(chosen, str) else chosen or Drawing
    made: Drawing = kind(members)
    return made
