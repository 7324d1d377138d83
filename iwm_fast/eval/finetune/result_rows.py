"""A finetuning's metrics as table rows and lines below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.eval.footnotes import data_lines
from iwm_fast.file_names import printable

__all__ = ["HEAD", "finetune_lines", "finetune_rows", "main_figure", "percent"]

HEAD = ("", "value", "95 % interval", "chance")
_MEASURES = (("top1", "top-1"), ("top5", "top-5"), ("miou", "mIoU"))


def percent(value: float) -> str:
    """Format a share as a percentage with one digit."""
    return f"{100 * value:.1f} %"


def main_figure(scores: Mapping[str, Any]) -> float:
    """Return top-1 accuracy or mIoU; of several tasks their mean."""
    return float(next(scores[key] for key in ("mean", "top1", "miou") if key in scores))


def finetune_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return table rows: metric, after its task's name if there are several, and the columns of ``HEAD``."""
    rows = []
    for name, scores in results.get("tasks", {"": results}).items():
        of_task = f"{name}: " if name else ""
        for key, title in _MEASURES:
            if scores.get(key) is None:
                continue
            low, high = scores[f"{key}_interval"]
            chance = percent(scores["chance"]) if key == "top1" else ""
            rows.append([of_task + title, percent(scores[key]), f"{percent(low)} – {percent(high)}", chance])
    if "mean" in results:
        rows.append(["mean", percent(results["mean"]), "", ""])
    return rows


def finetune_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: about each task's images, after its name if there are several."""
    if "tasks" not in results:
        return data_lines(results)
    return [f"{printable(name)}: {line}" for name, scores in results["tasks"].items() for line in data_lines(scores)]
