"""Evaluate a saved run, and write its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.config.load import plugins_of
from iwm_fast.config.plugins import load_plugins
from iwm_fast.console import Count
from iwm_fast.engine.checkpoint.load import default_device
from iwm_fast.errors import UserError
from iwm_fast.eval.defaults import CACHE_LIMIT_GB, COMPONENT_IMAGES
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.feature_cache import FeatureCache
from iwm_fast.eval.measurements import divide, keep, place_of, read
from iwm_fast.eval.opened import OpenedExport, OpenedRun, opened
from iwm_fast.eval.overrides import check_overrides, for_evaluation, overridden
from iwm_fast.eval.registry import Kind, names, needed, unusual, usual
from iwm_fast.eval.report.report import write_report
from iwm_fast.eval.report.verdicts import verdict_results
from iwm_fast.eval.result_output import given, report_place
from iwm_fast.eval.splits import open_splits, require_same_classes, splits_record
from iwm_fast.eval.world_model.examples import RankedExample, ranked_examples
from iwm_fast.eval.world_model.frames import find_triplets, open_triplets
from iwm_fast.eval.world_model.sliders import SlidingExample, sliding_examples
from iwm_fast.eval.world_model.triplets import evaluate_triplets
from iwm_fast.file_names import printable
from iwm_fast.models.iwm import IWM

__all__ = ["evaluate_run"]

# Images of the report with their ranked banks: enough to see a pattern, few enough to scroll through.
_SHOWN_IMAGES = 6
_SLIDING_IMAGES = 3


def evaluate_run(
    run: Path,
    data: str | Path,
    *,
    what: Sequence[str] | None = None,
    checkpoint: str = "latest",
    images: int | None = None,
    name: str | None = None,
    components: bool = False,
    full: bool = False,
    cache: Path | None = None,
    cache_limit: float = CACHE_LIMIT_GB,
    overrides: Sequence[str] = (),
    progress: Count | None = None,
    give: Callable[[dict[str, Any]], None] | None = None,
    report: bool = True,
) -> dict[str, Any]:
    """Evaluate ``what`` on a run's checkpoint and the images under ``data``; write ``RUN/report/index.html``.

    Results are saved in RUN/results (`measurements`), and the report shows all saved results. ``run`` may be an export
    (`opened`): the same numbers, a report without training curves.

    ``what``: default everything quick, with ``full`` everything. ``images``: those whose banks are ranked, default
    ``eval.mrr_images``; of triplets, the next frames that are ranked, default ``eval.bank``. ``name``: the report's
    title, default the run's folder. ``components``: as in ``evaluate_model``, each on ``COMPONENT_IMAGES`` images, with
    ``full`` on all. ``cache``: the folder of cached features, default ``RUN/cache``, of at most ``cache_limit`` GB; of
    an export a temporary one.
    ``overrides``: ``key.path=value`` of the jitter's strength, ``eval`` and ``data``, in place of the run's own.
    ``give`` gets the results before pictures are drawn and files are written. ``report``: False if the run may belong
    to another user: if its folder cannot be written, a line says so, and ``report`` is None.
    Returns the names and values of ``evaluate_model``, with ``step``, ``weights`` (the digest of the checkpoint) and
    ``report``; ``splits``: the training and the test data; ``left_out``: images that cannot be decoded.
    Raises UserError for an unknown ``what``, a folder that is not a run, an override without effect, and data that
    cannot be used, or of which more than ``data.max_bad_fraction`` cannot be decoded.
    """
    load_plugins(plugins_of(overrides))
    source = opened(run, checkpoint)  # loads the plugins of the run
    external = source.external
    _check_what(what)
    kind: Kind = "triplets" if external else "images"
    by_default = [] if what or full else [*unusual(kind)]
    what = what or (names(kind) if full else usual(kind))
    check_overrides(overrides, command="evaluate", external=external, what=what)
    _check_images(images, overrides, what, external=external)
    source.require_weights()
    page = report_place(source.folder, needed=report)
    model, config, space, step = source.load(overrides)
    config = for_evaluation(config, overrides)
    subject = _Subject(model.to(default_device()), config, space, data, what, images, progress)
    with source.cache(cache) as folder:
        if external:
            measured = _measure_triplets(subject)
        else:
            kept = FeatureCache(folder, cache_limit)
            measured = _measure_images(subject, kept, components, None if full else COMPONENT_IMAGES)
        measured.results.update(verdict_results(measured.results))
        if by_default:
            measured.results["not_by_default"] = by_default
        report_page = None if page is None else str(page)
        answer = {**measured.results, "step": step, "weights": source.weights(), "report": report_page}
        with given(give, answer):
            if page is not None:
                _write_page(page, source, name, subject, measured, step)
    return answer


def _write_page(
    page: Path, source: OpenedRun | OpenedExport, name: str | None, subject: _Subject, measured: _Measured, step: int
) -> None:
    """Keep the results in the folder, and write its report."""
    weights = source.weights()
    keep(source.folder, divide(measured.results, step=step, weights=weights, data=subject.data))
    examples, sliding = measured.draw()
    write_report(
        page,
        config=subject.config,
        name=name or source.folder.resolve().name,
        step=step,
        results=measured.results,
        measured=read(source.folder),
        subject=(weights, place_of(subject.data)),
        metrics=source.metrics(),
        examples=examples,
        sliding=sliding,
        environment=source.environment(),
    )


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, and on which data."""

    model: IWM
    config: Config
    space: ActionSpace
    data: str | Path
    what: Sequence[str]
    images: int | None
    progress: Count | None


@dataclass(frozen=True)
class _Measured:
    """Results, and a function that returns the report's examples."""

    results: dict[str, Any]
    draw: Callable[[], tuple[Sequence[RankedExample], Sequence[SlidingExample]]]


def _measure_triplets(subject: _Subject) -> _Measured:
    manifest, unused = find_triplets(subject.data)
    results, examples = evaluate_triplets(
        subject.model, subject.config, subject.space, open_triplets(subject.data, subject.config),
        what=subject.what, bank=subject.images, examples=_SHOWN_IMAGES, progress=subject.progress,
    )  # fmt: skip
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    said = printable(f"{manifest} is tested on{rest}")
    results["splits"] = {"test": str(manifest), "how": "manifest", "not_used": unused, "said": said}
    return _Measured(results, lambda: (examples, []))


def _measure_images(
    subject: _Subject, cache: FeatureCache, components: bool, component_images: int | None
) -> _Measured:
    model, config, space = subject.model, subject.config, subject.space
    train, test = open_splits(subject.data, config, source=config.data.source)
    if "classes" in needed(subject.what, "images"):
        require_same_classes(train, test)
    results = evaluate_model(
        model, config, space, train=train, test=test, what=subject.what, images=subject.images, components=components,
        component_images=component_images, cache=cache, progress=subject.progress,
    )  # fmt: skip

    def draw() -> tuple[Sequence[RankedExample], Sequence[SlidingExample]]:
        ranked = ranked_examples(model, config, space, test.spread(_SHOWN_IMAGES), bank=config.eval.bank)
        return ranked, sliding_examples(model, config, space, test.spread(_SLIDING_IMAGES), bank=config.eval.bank)

    return _Measured(results | splits_record(train, test), draw)


def _check_what(what: Sequence[str] | None) -> None:
    unknown = [word for word in what or () if word not in names()]
    if unknown or (what is not None and not what):
        raise UserError(f"--what: {unknown[0] if unknown else 'empty'}: give a list of {', '.join(names())}")


def _check_images(images: int | None, overrides: Sequence[str], what: Sequence[str], *, external: bool) -> None:
    """Raise UserError if --images has no effect, or contradicts an override."""
    if images is None:
        return
    if "mrr" not in what:
        raise UserError("--images: it is for mrr, which --what leaves out; leave it out")
    key = "eval.bank" if external else "eval.mrr_images"
    if key in overridden(overrides):
        raise UserError(f"--images and {key} set the same value; give one of them")
