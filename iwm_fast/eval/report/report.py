"""The report: one HTML page with its pictures inline, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.config import Config, dump_config
from iwm_fast.engine.metrics.log import metrics_record
from iwm_fast.eval.footnotes import by_default_lines, data_lines
from iwm_fast.eval.measurements import Measurement, merged
from iwm_fast.eval.registry import unusual
from iwm_fast.eval.report.charts import curve
from iwm_fast.eval.report.dates import Dated, kept_table
from iwm_fast.eval.report.drawing import drawings
from iwm_fast.eval.report.example_page import example_card
from iwm_fast.eval.report.page import Charts, Fold, Section, document, facts
from iwm_fast.eval.report.slider_page import SCRIPT, slider_card
from iwm_fast.eval.report.verdicts import verdict_lines
from iwm_fast.eval.world_model.examples import RankedExample
from iwm_fast.eval.world_model.sliders import SlidingExample
from iwm_fast.file_names import printable

__all__ = ["read_metrics", "write_report"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; unreadable lines are left out. A missing file has no records."""
    if not path.exists():
        return []
    found = map(metrics_record, path.read_bytes().splitlines(keepends=True))
    return [record for record in found if record is not None]


def _measures(results: Mapping[str, Any], said: Dated) -> list[Section]:
    """Return the sections of a checkpoint's results on one set of images."""
    found = ((drawing, drawing.section(results, said)) for drawing in drawings())
    return [
        replace(section, verdicts=verdict_lines(results, drawing.names, ends=False))
        for drawing, section in found
        if section is not None
    ]


def _notes(results: Mapping[str, Any], shown: Mapping[str, Any], *, external: bool) -> list[str]:
    """Return what did not run now, and of all that is ``shown`` what was reduced or is left out by default."""
    failed = results.get("not_run", {})
    rest = [name for name in unusual("triplets" if external else "images") if name not in shown and name not in failed]
    return [
        *(f"{what} not run: {why}" for what, why in failed.items()),
        *data_lines({**results, "reduced": shown.get("reduced", {})}),
        *by_default_lines(rest),
    ]


def _sliders(examples: Sequence[SlidingExample]) -> list[Section]:
    if not examples:
        return []
    said = (
        "Move a slider: the predictor is conditioned on that component of the action alone, and predicts a "
        "representation, never a picture. Shown are the views of the bank that are nearest to it; the correct one has "
        "a green frame. All predictions were computed in advance."
    )
    if any(slider.none is not None for slider in examples[0].sliders):
        said += (
            " A slider of a corruption changes the source; the predictor is conditioned on the corruption, and the "
            "clean view is correct."
        )
    cards = [slider_card(example, f"image{i}") for i, example in enumerate(examples)]
    return [Section("One action component along its range", cards, [said])]


def _examples(examples: Sequence[RankedExample]) -> list[Section]:
    if not examples:
        return []
    said = (
        "Each image is shown with the first action of its bank; images and actions were not chosen by their result. "
        "The numbers are ranks; the correct view has a green frame if it is among those shown."
    )
    return [Section("Views ranked first by the world model", [example_card(one) for one in examples], [said])]


def _training(metrics: Sequence[Mapping[str, Any]], mrr_chance: float | None) -> list[Section]:
    charts = [
        curve(metrics, {"loss": "loss"}, name="loss", label="loss"),
        curve(metrics, {"lr": "lr"}, name="lr", label="learning rate"),
        curve(metrics, {"rank_me": "RankMe"}, name="rankme", label="RankMe of the target"),
        curve(
            metrics,
            {f"energy_{part}": part for part in ("mean", "position", "image", "rest")},
            name="energy",
            label="share of token energy",
        ),
        curve(metrics, {"mrr": "MRR", "mrr_shuffled": "shuffled"}, name="mrr", label="MRR", chance=mrr_chance),
        curve(metrics, {"knn": "k-NN"}, name="knn", label="k-NN top-1"),
        curve(metrics, {"images_per_s": "images/s"}, name="speed", label="images per second"),
    ]
    shown = [chart for chart in charts if chart is not None]
    return [Section("Training", [Charts(shown)])] if shown else []


def write_report(
    path: Path,
    *,
    config: Config,
    name: str,
    step: int,
    results: Mapping[str, Any],
    measured: Sequence[Measurement] = (),
    subject: tuple[str, str] = ("", ""),
    metrics: Sequence[Mapping[str, Any]],
    examples: Sequence[RankedExample],
    sliding: Sequence[SlidingExample] = (),
    environment: Mapping[str, Any],
    date: datetime | None = None,
) -> None:
    """Write the page to ``path`` atomically, and create its folders.

    ``name``: the configuration's. ``results``: from ``evaluate_model``; sections without results are left out.
    ``measured``: all measurements of the run; ``subject``: the checkpoint and the data of ``results`` as they name
    them. That checkpoint's are shown in full, on every data, the rest in a table.
    ``metrics``: from ``read_metrics``. ``date``: default now.
    """
    when = (date or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    speeds = [r["images_per_s"] for r in metrics if isinstance(r.get("images_per_s"), int | float)]
    losses = [r["loss"] for r in metrics if isinstance(r.get("loss"), int | float)]
    lead = [f"step {step}", when]
    if losses:
        lead.append(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    if speeds:
        lead.append(f"{sorted(speeds)[len(speeds) // 2]:.0f} images/s")
    mine = [one for one in measured if one.weights == subject[0]]
    of_data = [one for one in mine if one.data == subject[1]]
    others = list(dict.fromkeys(one.data for one in reversed(mine) if one.data != subject[1]))
    kept = merged(of_data)
    shown = {**kept, **results, "reduced": kept.get("reduced", {}) | results.get("reduced", {})}
    notes = _notes(results, shown, external=config.actions.is_external)
    sections = [
        *_measures(shown, Dated.of(mine, subject[1])),
        *_sliders(sliding),
        *_examples(examples),
        *(
            section
            for number, place in enumerate(others, start=1)
            for section in _measures(merged([m for m in mine if m.data == place]), Dated.of(mine, place, number))
        ),
        *kept_table(measured),
        *_training(metrics, results.get("mrr_chance")),
        Section(
            "How it was made", [Fold("Configuration", dump_config(config)), Fold("Environment", facts(environment))]
        ),
    ]
    page = document(
        f"{name}, step {step}",
        name,
        " · ".join(lead),
        list(map(printable, notes)),
        sections,
        [SCRIPT] if sliding else [],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole_text(path, page)
