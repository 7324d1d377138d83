"""Charts with a line per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from iwm_fast.eval.compare.subjects import Subject
from iwm_fast.eval.report.charts import overlaid

__all__ = ["Axis", "axis_of", "charts"]

Axis = Literal["steps", "images"]

_SHOWN = 500  # points per line: about what 330 pixels can show
# Keys of metrics.jsonl, or of finetuning curves, and their labels.
_CURVES = {
    "loss": "loss",
    "rank_me": "RankMe of the target",
    "lr": "learning rate",
    "images_per_s": "images per second",
    "mrr": "MRR",
    "knn": "k-NN top-1",
}
_FINETUNING = {"loss": "finetuning loss", "test": "score on test images"}


def axis_of(subjects: Sequence[Subject], requested: Axis | None) -> Axis:
    """Return the x axis: the requested one, else images if the runs' batch sizes differ."""
    if requested is not None:
        return requested
    batches = {subject.settings.get("train.global_batch") for subject in subjects if subject.records}
    return "images" if len(batches) > 1 else "steps"


def charts(subjects: Sequence[Subject], axis: Axis) -> list[str]:
    """Return the charts with data, as SVG. A run has the same colour in all of them."""
    x = "step" if axis == "steps" else "samples_seen"
    across = "step" if axis == "steps" else "images seen"
    found = []
    for key, label in _CURVES.items():
        lines = [_points(subject.records, x, key) for subject in subjects]
        found.append(_chart(subjects, lines, f"curve{key.replace('_', '')}", across, label))
    for key, label in _FINETUNING.items():
        lines = [_points(subject.results.get("curve") or (), "step", key) for subject in subjects]
        found.append(_chart(subjects, lines, f"finetuned{key}", "step of finetuning", label))
    return [chart for chart in found if chart is not None]


def _chart(
    subjects: Sequence[Subject], lines: Sequence[tuple[list[float], list[float]]], name: str, across: str, label: str
) -> str | None:
    named = [(subject.name, *line) for subject, line in zip(subjects, lines, strict=True)]
    if not any(xs for _, xs, _ in named):
        return None
    return overlaid(named, name=name, across=across, label=label)


def _points(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return x and y of the records that have both as numbers, at most about `_SHOWN` of them, with the last."""
    pairs = [(r[x], r[y]) for r in records if isinstance(r.get(x), int | float) and isinstance(r.get(y), int | float)]
    every = -(-len(pairs) // _SHOWN) or 1
    kept = pairs[::every] + (pairs[-1:] if pairs and (len(pairs) - 1) % every else [])
    return [float(place) for place, _ in kept], [float(value) for _, value in kept]
