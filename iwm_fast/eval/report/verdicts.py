"""Whether what was measured is better than its controls: one sentence per measurement, by 95 % intervals alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iwm_fast.eval.report.page import number, percent

__all__ = ["verdict_lines", "verdict_results"]

Results = Mapping[str, Any]

_TITLES = {
    "mrr": "MRR",
    "knn": "k-NN",
    "linear": "linear probe",
    "attentive": "attentive probe",
    "equivariance": "equivariance",
}


def verdict_lines(results: Results, names: Sequence[str] = tuple(_TITLES), *, ends: bool = True) -> list[str]:
    """A sentence for MRR and for each measurement of ``names`` that has an untrained network beside it.

    ends: False beside a table that has the intervals.
    """
    found = {name: _verdict(results, name, ends=ends) for name in _TITLES if name in names}
    return [f"{_TITLES[name]}: {said}" for name, said in found.items() if said]


def verdict_results(results: Results) -> dict[str, str]:
    """The same for JSON: NAME_verdict."""
    return {f"{name}_verdict": said for name in _TITLES if (said := _verdict(results, name))}


def _verdict(results: Results, name: str, *, ends: bool = True) -> str:
    """Empty where there is no control."""
    if name == "mrr":
        return _mrr(results, ends=ends) if "mrr_interval" in results and "mrr_chance" in results else ""
    own, other = results.get(f"{name}_interval"), results.get(f"{name}_untrained_interval")
    if not own or not other:
        return ""
    form = number if name == "equivariance" else percent
    return _compared(own, other, "untrained", form if ends else None)


def _compared(own: Sequence[float], other: Sequence[float], name: str, form: Callable[[float], str] | None) -> str:
    if own[0] > other[1]:
        return f"better than {name}"
    if own[1] < other[0]:
        return f"worse than {name}"
    said = f"no better than {name}: the 95 % intervals overlap"
    return said if form is None else f"{said} ({_span(own, form)} and {_span(other, form)})"


def _mrr(results: Results, *, ends: bool) -> str:
    own, chance = results["mrr_interval"], results["mrr_chance"]
    if own[0] > chance:
        said = "better than chance"
    else:
        said = f"no better than chance ({number(chance)}): the 95 % interval begins at {number(own[0])}"
    shuffled = results.get("mrr_shuffled_interval")
    return said + (
        f"; {_compared(own, shuffled, 'with shuffled actions', number if ends else None)}" if shuffled else ""
    )


def _span(ends: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} – {form(ends[1])}"
