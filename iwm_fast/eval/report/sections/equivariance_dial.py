"""The dial's section: the checkpoint's place between invariant and equivariant, beside the untrained network."""

from __future__ import annotations

from iwm_fast.eval.report.charts import Place, places
from iwm_fast.eval.report.dates import Dated
from iwm_fast.eval.report.drawing import Drawing, Figure, Results, interval
from iwm_fast.eval.report.page import Charts, Section, Table, number
from iwm_fast.eval.representation.view_pairs import left_out_line

__all__ = ["EquivarianceDrawing"]

_MEAN = "equivariance: R², mean"
_ENDS = {"": "this checkpoint", "_untrained": "untrained"}


class EquivarianceDrawing(Drawing):
    """Equivariance and invariance, and R² of each component."""

    def figures(self, results: Results) -> list[Figure]:
        """Return both, then each component's R²."""
        regressed = [key for key in results if key.startswith("r2_") and f"{key}_untrained" in results]
        components = [Figure(key, title=_component(key)) for key in regressed]
        return [Figure("equivariance", title=_MEAN), Figure("invariance"), *components]

    def lines(self, results: Results) -> list[str]:
        """Return the components without R², and why."""
        left_out = results.get("equivariance_left_out")
        return [f"r2 left out: {left_out_line(left_out)}"] if left_out else []

    def section(self, results: Results, said: Dated) -> Section | None:
        """Return the table and the place on the dial."""
        if "equivariance" not in results:
            return None
        ends = [end for end in _ENDS if f"equivariance{end}" in results]
        chart = places(
            [_place(results, end) for end in ends],
            name=f"dial{said.end}",
            x_label="invariance",
            y_label="equivariance, R²",
        )
        names = {"invariance": "invariance", "equivariance": _MEAN}
        names |= {
            key: _component(key)
            for key in results
            if key.startswith("r2_") and not key.endswith(("_interval", "_untrained"))
        }
        rows = [
            [
                label,
                *(
                    cell
                    for end in _ENDS
                    if key + end in results
                    for cell in (number(results[key + end]), interval(results, key + end))
                ),
            ]
            for key, label in names.items()
        ]
        head = ["", "value", "95 % interval", "untrained", "95 % interval"][: len(rows[0])]
        return Section(
            said.title("Between invariant and equivariant"),
            [Table(head, rows), Charts([chart])],
            [*_notes(results), *said.lines("equivariance")],
        )


def _component(key: str) -> str:
    """What the page and the terminal call a component's R²."""
    return f"R² of {key.removeprefix('r2_')}"


def _place(results: Results, end: str) -> Place:
    return Place(
        _ENDS[end],
        results[f"invariance{end}"],
        results[f"equivariance{end}"],
        results[f"invariance{end}_interval"],
        results[f"equivariance{end}_interval"],
    )


def _notes(results: Results) -> list[str]:
    """Return the protocol, and what was left out."""
    pairs = results["equivariance_pairs"]
    left_out = left_out_line(results.get("equivariance_left_out", {}))
    views = (
        f"Two views of each of {pairs[0]} training and {pairs[1]} test images under the run's actions, jitter always "
        f"applied; pooled features of the {results['equivariance_encoder']} encoder. Equivariance: R² on the test "
        "images of a ridge regression of the action between the views from both features, 0 if nothing is predicted. "
        "Flags are regressed as 0 or 1; a strength (sigma, threshold, quality) only on pairs that have its flag."
    )
    invariance = (
        "Invariance: cosine of the two views' features on a scale where 1 is the same and 0 as far apart as two "
        f"images; the raw cosines are {number(results['cosine_same'])} and {number(results['cosine_other'])}. "
        "Interval by bootstrap over test images."
    )
    return [views, *([f"Left out: {left_out}."] if left_out else []), invariance]
