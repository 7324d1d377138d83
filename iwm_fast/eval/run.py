"""Measure a run that lies on disk, and write its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iwm_fast.engine.loading import default_device, find_checkpoint, load_model
from iwm_fast.engine.rundir import RunDirectory
from iwm_fast.errors import UserError
from iwm_fast.eval.bank import JITTER_COMPONENTS
from iwm_fast.eval.cache import FeatureCache
from iwm_fast.eval.evaluate import USUAL, WHAT, evaluate_model
from iwm_fast.eval.examples import ranked_examples
from iwm_fast.eval.frames import open_triplets
from iwm_fast.eval.giving import given, report_place
from iwm_fast.eval.measurements import divide, keep, place_of, read, weights_of
from iwm_fast.eval.progress import Progress
from iwm_fast.eval.report import read_metrics, write_report
from iwm_fast.eval.representation import PROBES
from iwm_fast.eval.sliders import SlidingExample, sliding_examples
from iwm_fast.eval.splits import open_splits, require_same_classes
from iwm_fast.eval.triplets import TRIPLETS_WHAT, evaluate_triplets

__all__ = ["evaluate_run", "result_rows"]

# Images of the report whose banks are shown as ranked: enough to see a habit, few enough to scroll through.
_SHOWN_IMAGES = 6
_SLIDING_IMAGES = 3
# Keys that say what is asked of a model, and not what it is.
_FREE = ("eval.", "data.", *(f"actions.{name}" for name in ("strength", *JITTER_COMPONENTS)))


def evaluate_run(
    run: Path,
    data: str | Path,
    *,
    what: Sequence[str] | None = None,
    checkpoint: str = "latest",
    images: int | None = None,
    name: str | None = None,
    components: bool = False,
    cache: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    give: Callable[[dict[str, Any]], None] | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Measure ``what`` of a run's checkpoint on the images under ``data``; also writes ``RUN/report/index.html``.

    What is measured is kept in RUN/results (`measurements`), and the report shows all that was.

    ``what``: default all that is quick. ``images``: those whose banks are ranked, default ``eval.mrr_images``; of
    triplets, the next frames that are ranked, default ``eval.bank``. ``name``: the report's title, default the run's
    folder. ``components``: as in ``evaluate_model``. ``cache``: where features are kept, default ``RUN/cache``.
    ``overrides``: ``key.path=value`` of the jitter's strength, ``eval`` and ``data``, in place of the run's own.
    ``give`` gets the answer as soon as it is measured, before pictures are drawn and files are written. ``report``:
    False where the run may be another user's: where its folder cannot be written, that is said, and ``report`` is None.
    Returns the names and values of ``evaluate_model``, with ``step`` and ``report``.
    Raises UserError for an unknown ``what``, a folder that is no run, and data that cannot be used.
    """
    unknown = [word for word in what or () if word not in WHAT]
    if unknown or (what is not None and not what):
        raise UserError(f"--what: {unknown[0] if unknown else 'empty'}: it is a list of {', '.join(WHAT)}")
    for word in overrides:
        if not word.startswith(_FREE):
            raise UserError(
                f"command line: {word}: evaluation may change {', '.join(_FREE)} only; the rest is the run's"
            )
    saved = find_checkpoint(run, checkpoint)
    page = report_place(run, needed=report)
    model, config, space, step = load_model(run, saved.name, overrides)
    model.to(default_device())
    sliding: Sequence[SlidingExample] = []
    if config.actions.groups == ("external",):
        results, shown = evaluate_triplets(
            model, config, space, open_triplets(data, config),
            what=what or TRIPLETS_WHAT, bank=images, examples=_SHOWN_IMAGES, progress=progress,
        )  # fmt: skip
    else:
        what = what or USUAL
        train, test = open_splits(data, config)
        if set(what) & set(PROBES):
            require_same_classes(train, test, data)
        results = evaluate_model(
            model,
            config,
            space,
            train=train,
            test=test,
            what=what,
            images=images,
            components=components,
            cache=FeatureCache(cache if cache is not None else run / "cache"),
            progress=progress,
        )
    answer = {**results, "step": step, "report": None if page is None else str(page)}
    with given(give, answer):
        if page is None:
            return answer
        weights = weights_of(saved)
        keep(run, divide(results, step=step, weights=weights, data=data))
        if config.actions.groups != ("external",):
            shown = ranked_examples(model, config, space, test.spread(_SHOWN_IMAGES), bank=config.eval.bank)
            sliding = sliding_examples(model, config, space, test.spread(_SLIDING_IMAGES), bank=config.eval.bank)
        write_report(
            page,
            config=config,
            name=name or run.resolve().name,
            step=step,
            results=results,
            measured=read(run),
            subject=(weights, place_of(data)),
            metrics=read_metrics(run / "metrics.jsonl"),
            examples=shown,
            sliding=sliding,
            environment=json.loads(RunDirectory(run).environment_file.read_text())["environment"],
        )
    return answer


def result_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row a measure for a table of a terminal: value, 95 % interval, chance, shuffled, neutral, untrained.

    What does not apply is empty; all the rest of ``results``, the protocol above all, is left to JSON and report.
    """
    rows = []
    regressed = [key for key in results if key.startswith("r2_") and f"{key}_untrained" in results]
    alone = ("h1", "h5", "knn", *PROBES[1:], "equivariance", "invariance", *regressed)
    for name, distance in (("mrr", ""), ("mrr", "_cosine"), *((n, "") for n in alone)):
        if name + distance not in results:
            continue
        low, high = results.get(f"{name}{distance}_interval") or (None, None)
        beside = [f"{name}_chance", *(f"{name}_{what}{distance}" for what in ("shuffled", "neutral", "untrained"))]
        rows.append(
            [
                name + distance,
                f"{results[name + distance]:.4f}",
                "" if low is None else f"{low:.4f} – {high:.4f}",
                *(f"{results[key]:.4f}" if key in results else "" for key in beside),
            ]
        )
    for part, found in results.get("components", {}).items():
        low, high = found["mrr_interval"]
        controls = [f"{found[f'mrr_{key}']:.4f}" for key in ("chance", "shuffled", "neutral")]
        rows.append([f"mrr, {part}", f"{found['mrr']:.4f}", f"{low:.4f} – {high:.4f}", *controls, ""])
    return rows
