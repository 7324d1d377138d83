"""The demonstration: generate images, pretrain a tiny IWM on them as any run, evaluate it, and write the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iwm_fast.config import load_config, packaged_config
from iwm_fast.console import Count
from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.engine import pretrain
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError
from iwm_fast.eval.online import OnlineEvaluator
from iwm_fast.eval.report.report import read_metrics
from iwm_fast.eval.run import evaluate_run

__all__ = ["demo", "demo_rows"]

CLASSES = 8
TRAIN_IMAGES = 4096
TEST_IMAGES = 800
IMAGE_SIZE = 64
SEED = 0


def demo(
    out: Path,
    overrides: Sequence[str] = (),
    progress: Count | None = None,
    give: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the demonstration in folder ``out``; return the metrics that it shows, ready for JSON.

    ``give`` gets them before the report is drawn.
    ``overrides``: of the packaged ``demo.yaml``. Raise UserError if ``out`` holds a run, or an override names data.
    """
    began = time.perf_counter()
    if (out / "checkpoints").exists():
        raise UserError(f"{out}: holds a run already; choose another --out, or remove it")
    if any(word.startswith("data.root=") for word in overrides):
        raise UserError("command line: data.root: demo generates its images; use iwm-fast pretrain for yours")
    data = out / "data"
    config = load_config(packaged_config("demo"), [*overrides, f"data.root={data / 'train'}"])
    draw_dataset(data, classes=CLASSES, train=TRAIN_IMAGES, test=TEST_IMAGES, size=IMAGE_SIZE, seed=SEED)
    pretrain(config, out, "never", evaluator=OnlineEvaluator(), alone=True)
    if RunDirectory(out).stopped_file.exists():
        raise UserError(f"{out}: stopped early; run demo again with another --out")
    figures: dict[str, Any] = {}

    def given(measured: Mapping[str, Any]) -> None:
        figures.update(_figures(out, measured), seconds=time.perf_counter() - began)
        if give is not None:
            give(figures)

    evaluate_run(out, data, name="demo", progress=progress, give=given)
    return figures


def _figures(out: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    names = ("mrr", "mrr_chance", "mrr_shuffled", "mrr_neutral", "knn", "knn_untrained", "linear", "linear_untrained")
    return {
        "loss_first": records[0]["loss"],
        "loss_last": records[-1]["loss"],
        **{name: measured[name] for name in names},
        "images_per_s": statistics.median(record["images_per_s"] for record in records),
        "steps": measured["step"],
        "report": measured["report"],
    }


def demo_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (metric, value, note) of each line of the demonstration's table."""
    chance = figures["mrr_chance"]
    return [
        ("loss", f"{figures['loss_first']:.4f} → {figures['loss_last']:.4f}", f"{figures['steps']} steps"),
        ("MRR", f"{figures['mrr']:.3f}", f"{figures['mrr'] / chance:.1f} × chance ({chance:.4f})"),
        ("MRR, shuffled actions", f"{figures['mrr_shuffled']:.3f}", "the action of another target"),
        ("MRR, neutral action", f"{figures['mrr_neutral']:.3f}", "the predictor gets no action"),
        ("k-NN", f"{figures['knn']:.1%}", f"untrained {figures['knn_untrained']:.1%}"),
        ("linear probe", f"{figures['linear']:.1%}", f"untrained {figures['linear_untrained']:.1%}"),
        ("images/s", f"{figures['images_per_s']:.0f}", f"{figures['seconds']:.0f} s in all"),
        ("report", figures["report"], "open it in a browser"),
    ]
