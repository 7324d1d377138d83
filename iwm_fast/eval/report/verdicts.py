"""Whether what was measured is better than its controls: one sentence per measurement, by 95 % intervals alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iwm_fast.eval.report.page import number, percent

__all__ = ["verdict_lines"]

Results = Mapping[str, Any]

_PROBES = (("knn", "k-NN"), ("linear", "linear probe"), ("attentive", "attentive probe"))


def verdict_lines(results: Results) -> list[str]:
    """A sentence for MRR and for each measurement that has an untrained network beside it."""
    lines = [_mrr(results)] if "mrr_interval" in results and "mrr_chance" in results else []
    for key, title in (*_PROBES, ("equivariance", "equivariance")):
        own, other = results.get(f"{key}_interval"), results.get(f"{key}_untrained_interval")
        if own and other:
            form = number if key == "equivariance" else percent
            lines.append(f"{title}: {_compared(own, other, 'untrained', form)}")
    return lines


def _compared(own: Sequence[float], other: Sequence[float], name: str, form: Callable[[float], str]) -> str:
    if own[0] > other[1]:
        return f"better than {name}"
    if own[1] < other[0]:
        return f"worse than {name}"
    return f"no better than {name}: the 95 % intervals overlap ({_span(own, form)} and {_span(other, form)})"


def _mrr(results: Results) -> str:
    own, chance = results["mrr_interval"], results["mrr_chance"]
    if own[0] > chance:
        said = "better than chance"
    else:
        said = f"no better than chance ({number(chance)}): the 95 % interval begins at {number(own[0])}"
    shuffled = results.get("mrr_shuffled_interval")
    return f"MRR: {said}" + (f"; {_compared(own, shuffled, 'with shuffled actions', number)}" if shuffled else "")


def _span(ends: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} – {form(ends[1])}"
