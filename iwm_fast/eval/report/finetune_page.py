"""The page of a finetuning: scores, and curves of loss and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from iwm_fast.eval.finetune.result_rows import HEAD, finetune_lines, finetune_rows
from iwm_fast.eval.report.charts import curve
from iwm_fast.eval.report.page import Charts, Fold, Section, Table, document, facts, percent
from iwm_fast.file_names import printable

__all__ = ["finetune_page"]


def finetune_page(name: str, results: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return one self-contained HTML page. ``results``: from `finetune_run`."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lead = f"finetuned from step {results['step']} · {results['mode']} · {when}"
    learned = f"{results['trained_parameters']:,} parameters trained in {results['seconds']:.0f} s"
    tried = [
        [
            rate,
            "the loss was not finite" if score is None else percent(score),
            "chosen" if rate == f"{results['lr']:g}" else "",
        ]
        for rate, score in results["lr_tried"].items()
    ]
    said = {key: value for key, value in results.items() if key not in ("curve", "protocol")}
    sections = [
        Section("Scores on the test images", [Table(HEAD, finetune_rows(results))]),
        *_curves(results),
        Section(
            "Learning rates tried",
            [Table(("peak learning rate of the head", "held-out score", ""), tried)],
            [results["protocol"]],
        ),
        Section("How it was made", [Fold("Figures", facts(said)), Fold("Environment", facts(environment))]),
    ]
    notes = [learned, *map(printable, finetune_lines(results))]
    return document(f"{printable(name)}, finetuned", printable(name), lead, notes, sections)


def _curves(results: Mapping[str, Any]) -> list[Section]:
    points: Sequence[Mapping[str, Any]] = results["curve"]
    shown = [{**point, "test": 100 * point["test"]} for point in points if point["test"] is not None]
    title = "mean score" if "mean" in results else "top-1" if "top1" in results else "mIoU"
    chance = 100 * results["chance"] if "chance" in results else None
    charts = [
        curve(points, {"loss": "loss"}, name="loss", label="training loss"),
        curve(shown, {"test": f"test {title}"}, name="score", label=f"test {title}, %", chance=chance),
    ]
    counts = results["curve_test_images"]
    several = len(counts) > 1
    images = " and ".join(
        f"{count} of {printable(name)}" if several else f"{count} of them" for name, count in counts.items()
    )
    note = (
        f"{results['epochs']:.3g} epochs of the training images. The loss is the mean since the point before. The last "
        f"score is of all test images, the others of {images}, spread evenly; nothing is chosen by them."
    )
    return [Section("Training", [Charts([chart for chart in charts if chart is not None])], [note])]
