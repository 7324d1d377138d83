"""The world model's section: mean reciprocal rank beside its controls."""

from __future__ import annotations

from iwm_fast.eval.report.charts import Bar, bars
from iwm_fast.eval.report.dates import Dated
from iwm_fast.eval.report.drawing import Drawing, Figure, Results, interval
from iwm_fast.eval.report.page import Charts, Section, Table, number, percent

__all__ = ["MrrDrawing"]

_NAMES = {
    "": "world model",
    "_shuffled": "shuffled action",
    "_neutral": "neutral action",
    "_bypass": "no predictor",
}


_MEASURES = (
    ("MRR", "mrr", "", number),
    ("MRR, cosine of pooled tokens", "mrr", "_cosine", number),
    ("H@1", "h1", "", percent),
    ("H@5", "h5", "", percent),
)


class MrrDrawing(Drawing):
    """MRR and hits by distance, beside chance and controls, and for each action component alone."""

    def figures(self, results: Results) -> list[Figure]:
        """Return MRR by both distances, then the hits."""
        del results
        return [Figure(key, end, name, form) for name, key, end, form in _MEASURES]

    def rows(self, results: Results) -> list[list[str]]:
        """Return one row per component alone."""
        rows = []
        for part, found in results.get("components", {}).items():
            low, high = found["mrr_interval"]
            controls = [number(found[f"mrr_{key}"]) for key in ("chance", "shuffled", "neutral")]
            rows.append([f"MRR, {part} alone", number(found["mrr"]), f"{number(low)} – {number(high)}", *controls, ""])
        return rows

    def section(self, results: Results, said: Dated) -> Section | None:
        """Return table, bars and components."""
        if "mrr" not in results:
            return None
        head = ["", "value", "95 % interval", "chance", "shuffled action", "neutral action", "no predictor"]
        values = [Bar(name, results[f"mrr{end}"], results.get(f"mrr{end}_interval")) for end, name in _NAMES.items()]
        values.insert(1, Bar("chance", results["mrr_chance"]))
        chart = bars(values, name=f"mrrbars{said.end}", label="mean reciprocal rank")
        parts = [
            [name, *(number(part[key]) for key in ("mrr", "mrr_chance", "mrr_shuffled"))]
            for name, part in results.get("components", {}).items()
        ]
        alone = Table(["component alone", "MRR", "chance", "shuffled"], parts) if parts else None
        return Section(
            said.title("The world model"),
            [Table(head, _rows(results)), Charts([chart], beside=alone)],
            [*_notes(results), *said.lines("mrr")],
        )


def _rows(results: Results) -> list[list[str]]:
    """Return one row per metric: value, interval, chance, then each control."""
    rows = []
    for name, key, end, form in _MEASURES:
        controls = [form(results[f"{key}{control}{end}"]) for control in list(_NAMES)[1:]]
        value = form(results[f"{key}{end}"])
        rows.append([name, value, interval(results, f"{key}{end}", form), form(results[f"{key}_chance"]), *controls])
    return rows


def _notes(results: Results) -> list[str]:
    """Return the protocol, and what the controls are."""
    if "mrr_protocol" in results:
        low, high = results["mrr_gain_interval"]
        controls = (
            f"Given the true action, 1 / rank is {results['mrr_gain']:+.3f} higher on average than given another "
            f"query's (95 % interval {low:+.3f} to {high:+.3f}; for {percent(results['mrr_shuffled_same'])} of the "
            "queries the other action is their own). Neutral: the zero vector. No predictor: the source frame's "
            "representation is the prediction, as if nothing had changed."
        )
        return [results["mrr_protocol"], controls]
    protocol = (
        f"The clean view of an image is encoded. Conditioned on one of {results['mrr_bank']} colour jitters, the "
        "predictor predicts all patches, and the jittered views are ranked by the distance of their representation to "
        f"the prediction. Mean of 1 / rank of the true one over {results['mrr_queries']} queries of each of "
        f"{results['mrr_images']} images; interval by bootstrap over images. Distance: L2 over all tokens."
    )
    controls = (
        "Shuffled: conditioned on another view's action. Neutral: conditioned on no change. No predictor: the source's "
        "representation is the prediction. The last two rank a bank once for all queries, so they are at chance."
    )
    return [protocol, controls]
