"""The report: one HTML page that holds its pictures, for a person with a browser and no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.config import Config, dump_config
from iwm_fast.engine.metrics.log import metrics_record
from iwm_fast.eval.footnotes import data_lines
from iwm_fast.eval.measurements import Measurement, merged
from iwm_fast.eval.report.charts import Bar, Line, Place, bars, curve, lines, places
from iwm_fast.eval.report.dates import Dated, kept_table
from iwm_fast.eval.report.page import document, example_block, facts, fold, number, percent, section, table
from iwm_fast.eval.report.slider_page import SCRIPT, slider_card
from iwm_fast.eval.representation.view_pairs import left_out_line
from iwm_fast.eval.world_model.examples import RankedExample
from iwm_fast.eval.world_model.sliders import SlidingExample
from iwm_fast.file_names import printable

__all__ = ["read_metrics", "write_report"]

_MRR_NAMES = {
    "": "world model",
    "_shuffled": "shuffled action",
    "_neutral": "neutral action",
    "_bypass": "no predictor",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that cannot be read are left out. A missing file has no records."""
    if not path.exists():
        return []
    found = map(metrics_record, path.read_bytes().splitlines(keepends=True))
    return [record for record in found if record is not None]


def _interval(results: Mapping[str, Any], key: str, form: Any) -> str:
    ends = results.get(f"{key}_interval")
    return f"{form(ends[0])} – {form(ends[1])}" if ends else ""


def _world_model_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a measure: value, interval, chance, then each control."""
    rows = []
    for name, key, end, form in (
        ("MRR", "mrr", "", number),
        ("H@1", "h1", "", percent),
        ("H@5", "h5", "", percent),
        ("MRR, cosine of pooled tokens", "mrr", "_cosine", number),
    ):
        controls = [form(results[f"{key}{control}{end}"]) for control in list(_MRR_NAMES)[1:]]
        value = form(results[f"{key}{end}"])
        rows.append([name, value, _interval(results, f"{key}{end}", form), form(results[f"{key}_chance"]), *controls])
    return rows


def _representation_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a measure: value, interval, then both of the untrained network."""
    rows = []
    for name, key in (
        ("k-NN top-1", "knn"),
        ("k-NN top-1, plain votes", "knn_plain"),
        ("linear probe top-1", "linear"),
        ("linear probe top-5", "linear_top5"),
        ("attentive probe top-1", "attentive"),
        ("attentive probe top-5", "attentive_top5"),
    ):
        if results.get(key) is not None:
            cells = [name]
            for column in (key, f"{key}_untrained"):
                value = results.get(column)
                cells += ["" if value is None else percent(value), _interval(results, column, percent)]
            rows.append(cells)
    return rows


def _world_model(results: Mapping[str, Any], said: Dated) -> str:
    head = ["", "value", "95 % interval", "chance", "shuffled action", "neutral action", "no predictor"]
    values = [
        Bar(f"{name}", results[f"mrr{end}"], results.get(f"mrr{end}_interval")) for end, name in _MRR_NAMES.items()
    ]
    values.insert(1, Bar("chance", results["mrr_chance"]))
    chart = bars(values, name=f"mrrbars{said.end}", label="mean reciprocal rank")
    parts = [
        [name, *(number(part[key]) for key in ("mrr", "mrr_chance", "mrr_shuffled"))]
        for name, part in results.get("components", {}).items()
    ]
    alone = table(["component alone", "MRR", "chance", "shuffled"], parts) if parts else ""
    return section(
        said.title("The world model"),
        table(head, _world_model_rows(results)) + f'<div class="charts"><div>{chart}</div>{alone}</div>',
        *_world_model_notes(results),
        *said.lines("mrr"),
    )


def _world_model_notes(results: Mapping[str, Any]) -> list[str]:
    """The protocol, and what the controls are."""
    if "mrr_protocol" in results:
        low, high = results["mrr_gain_interval"]
        controls = (
            f"Told the true action, 1 / rank is {results['mrr_gain']:+.3f} on average above that told another query's "
            f"(95 % interval {low:+.3f} to {high:+.3f}; {percent(results['mrr_shuffled_same'])} of the queries are "
            "told their own action all the same). Neutral: the zero vector. No predictor: the source frame's "
            "representation is the answer, as if nothing had changed."
        )
        return [results["mrr_protocol"], controls]
    protocol = (
        f"The clean view of an image is encoded; told one of {results['mrr_bank']} colour jitters, the predictor "
        "answers for all patches, and the jittered views are ranked by the distance of their representation to that. "
        f"Mean of 1 / rank of the true one over {results['mrr_queries']} queries of each of {results['mrr_images']} "
        "images; interval by bootstrap over images. Distance: L2 over all tokens."
    )
    controls = (
        "Shuffled: told another view's action. Neutral: told of no change. No predictor: the source's representation "
        "is the answer. The last two rank a bank once for all queries: with every action asked for they are at chance."
    )
    return [protocol, controls]


def _rollout(results: Mapping[str, Any], said: Dated) -> str:
    """The error over the horizon, beside copying the last frame."""
    rolled = results.get("rollout")
    if rolled is None:
        return ""
    names = {"model": "world model", "shuffled": "shuffled actions", "copy": "copy of the first frame"}
    drawn = [Line(name, rolled[key], rolled[f"{key}_interval"]) for key, name in names.items()]
    chart = lines(
        rolled["horizons"], drawn, name=f"rollout{said.end}", across="horizon, actions", label="mean square error"
    )
    rows = [[name, *(number(value) for value in rolled[key])] for key, name in names.items()]
    return section(
        said.title("Roll-outs"),
        f'<div class="charts"><div>{chart}</div></div>' + table(["horizon", *map(str, rolled["horizons"])], rows),
        f"From each of {rolled['starts']} frames the predictor's answer is fed back to it with the next action. Error: "
        "mean square over tokens and channels of its difference to the target representation of the frame that came. "
        "Bands: 95 % interval by bootstrap over roll-outs. Training asks for one step only.",
        *said.lines("rollout"),
    )


def _representation(results: Mapping[str, Any], said: Dated) -> str:
    rows = _representation_rows(results)
    if not rows:
        return ""
    protocol = (
        f"Frozen {results['encoder']} encoder, {results['pooling']}, {results['train_images']} training and "
        f"{results['test_images']} test images of {results['classes']} classes. Untrained: the same network as it was "
        "before the first step. Interval by bootstrap over test images."
    )
    notes = [protocol]
    if "knn_k" in results:
        notes.append(f"k-NN: k = {results['knn_k']}, votes weighted by exp(cosine / {results['knn_temperature']:g}).")
    if "linear_weight_decay" in results:
        notes.append(
            f"Linear probe: weight decay {results['linear_weight_decay']:g}, chosen on a tenth of the training images."
        )
    return section(
        said.title("The representation"),
        table(["", "value", "95 % interval", "untrained", "95 % interval"], rows),
        *notes,
        *said.lines("knn", "linear", "attentive"),
    )


def _dial(results: Mapping[str, Any], said: Dated) -> str:
    """Where the checkpoint lies between invariant and equivariant, beside the untrained network."""
    if "equivariance" not in results:
        return ""
    ends = {"": "this checkpoint", "_untrained": "untrained"}
    points = [
        Place(
            name,
            results[f"invariance{end}"],
            results[f"equivariance{end}"],
            results[f"invariance{end}_interval"],
            results[f"equivariance{end}_interval"],
        )
        for end, name in ends.items()
        if f"equivariance{end}" in results
    ]
    chart = places(points, name=f"dial{said.end}", x_label="invariance", y_label="equivariance, R²")
    names = {"invariance": "invariance", "equivariance": "equivariance: R², mean"}
    names |= {
        key: f"R² of {key.removeprefix('r2_')}"
        for key in results
        if key.startswith("r2_") and not key.endswith(("_interval", "_untrained"))
    }
    rows = [
        [label, *(cell for end in ends if key + end in results for cell in _cells(results, key + end))]
        for key, label in names.items()
    ]
    head = ["", "value", "95 % interval", "untrained", "95 % interval"][: len(rows[0])]
    pairs = results["equivariance_pairs"]
    left_out = left_out_line(results.get("equivariance_left_out", {}))
    return section(
        said.title("Between invariant and equivariant"),
        table(head, rows) + f'<div class="charts"><div>{chart}</div></div>',
        f"Two views of each of {pairs[0]} training and {pairs[1]} test images under the run's actions, jitter always "
        f"applied; pooled features of the {results['equivariance_encoder']} encoder. Equivariance: how much of what "
        "differs between the views a ridge regression tells from both features, R² on the test images, 0 for nothing. "
        "Flags are regressed as 0 or 1; sigma and threshold are asked of the pairs blurred or solarized.",
        *([f"Left out: {left_out}."] if left_out else []),
        "Invariance: cosine of the two views' features on a scale where 1 is the same and 0 as far apart as two "
        f"images; the raw cosines are {number(results['cosine_same'])} and {number(results['cosine_other'])}. "
        "Interval by bootstrap over test images.",
        *said.lines("equivariance"),
    )


def _cells(results: Mapping[str, Any], key: str) -> tuple[str, str]:
    return number(results[key]), _interval(results, key, number)


def _sliders(examples: Sequence[SlidingExample]) -> str:
    if not examples:
        return ""
    return section(
        "What one action does along its range",
        "".join(slider_card(example, f"image{i}") for i, example in enumerate(examples)),
        "Move a slider: the predictor is told that component of the action and no other, and its answer is a "
        "representation, never a picture. Shown are the views of the bank that come nearest to it; the one that was "
        "asked for has a green frame. All answers were computed beforehand.",
    )


def _measures(results: Mapping[str, Any], said: Dated) -> str:
    """What was measured of a checkpoint on one set of images."""
    parts = (
        _world_model(results, said) if "mrr" in results else "",
        _rollout(results, said),
        _representation(results, said),
        _dial(results, said),
    )
    return "\n".join(part for part in parts if part)


def _training(metrics: Sequence[Mapping[str, Any]], mrr_chance: float | None) -> str:
    charts = [
        curve(metrics, {"loss": "loss"}, name="loss", label="loss"),
        curve(metrics, {"lr": "lr"}, name="lr", label="learning rate"),
        curve(metrics, {"rank_me": "RankMe"}, name="rankme", label="RankMe of the target"),
        curve(metrics, {"mrr": "MRR", "mrr_shuffled": "shuffled"}, name="mrr", label="MRR", chance=mrr_chance),
        curve(metrics, {"knn": "k-NN"}, name="knn", label="k-NN top-1"),
        curve(metrics, {"images_per_s": "images/s"}, name="speed", label="images per second"),
    ]
    shown = "".join(f"<div>{chart}</div>" for chart in charts if chart is not None)
    return section("Training", f'<div class="charts">{shown}</div>') if shown else ""


def _examples(examples: Sequence[RankedExample]) -> str:
    if not examples:
        return ""
    return section(
        "What the world model takes for the answer",
        "".join(example_block(example) for example in examples),
        "Each image's first action is asked for; neither images nor actions were chosen by their result. The numbers "
        "are places in the ranking; the view that was asked for has a green frame where it is among those shown.",
    )


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
    """Write the page to ``path`` (folders are made), whole or not at all.

    ``name``: the configuration's. ``results``: of ``evaluate_model``; what was not measured is left out of the page.
    ``measured``: all that was kept of the run; ``subject``: the checkpoint and the data of ``results`` as it names
    them. What was measured of that checkpoint is shown in full, on every data, the rest in a table.
    ``metrics``: of ``read_metrics``. ``date``: default now.
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
    notes = [*(f"{what}: {why}" for what, why in results.get("not_run", {}).items()), *data_lines(results)]
    body = "\n".join(
        (
            f'<h1>{html.escape(name)}</h1><p class="soft">{html.escape(" · ".join(lead))}</p>',
            "".join(f'<p class="soft">{html.escape(printable(line))}</p>' for line in notes),
            _measures({**merged(of_data), **results}, Dated.of(mine, subject[1])),
            _sliders(sliding),
            _examples(examples),
            *(
                _measures(merged([one for one in mine if one.data == place]), Dated.of(mine, place, number))
                for number, place in enumerate(others, start=1)
            ),
            kept_table(measured),
            _training(metrics, results.get("mrr_chance")),
            section(
                "How it was made", fold("Configuration", dump_config(config)) + fold("Environment", facts(environment))
            ),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole_text(path, document(f"{name}, step {step}", body, SCRIPT if sliding else ""))
