"""Finetune a run on disk: read its features, fit, evaluate, and save the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iwm_fast.config import Config
from iwm_fast.config.base import home_expanded
from iwm_fast.console import Count
from iwm_fast.data.segmentation import is_masked
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.engine.checkpoint.load import default_device, load_model
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint
from iwm_fast.errors import UserError
from iwm_fast.eval.defaults import CACHE_LIMIT_GB
from iwm_fast.eval.feature_cache import FeatureCache, Features
from iwm_fast.eval.features import announce, default_encoder, encoder_of, read_features
from iwm_fast.eval.finetune.fitting import WARMUP, Fit, Plan, Point, fit, measure
from iwm_fast.eval.finetune.modes import (
    INITS,
    MODES,
    PRETRAINED_FACTOR,
    Init,
    Mode,
    default_rates,
    has_predictor,
    kept_for,
    reader_builder,
)
from iwm_fast.eval.finetune.result_rows import main_figure, percent
from iwm_fast.eval.finetune.saved import require_absent, save_finetuned
from iwm_fast.eval.finetune.scores import IGNORED
from iwm_fast.eval.finetune.tasks import Task, steps_per_epoch
from iwm_fast.eval.overrides import check_overrides, for_evaluation
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.result_output import given
from iwm_fast.eval.segmentation_split import MaskedSplit, open_masked_splits
from iwm_fast.eval.splits import FileSplit, Split, open_splits, require_same_classes, splits_record
from iwm_fast.file_names import printable
from iwm_fast.models.iwm import IWM
from iwm_fast.models.predictors import VitPredictor
from iwm_fast.models.task_model import HeadShape

__all__ = ["KINDS", "Request", "finetune_run", "named_folders"]

KINDS = ("classification", "segmentation")
Draw = Callable[[str, Mapping[str, Any], Mapping[str, Any]], str]  # name, results and environment to a page


@dataclass(frozen=True)
class Request:
    """A finetuning's settings. data: image folders by task name; kind: of task, default by the layout; its length
    (``steps``, or ``epochs`` of the largest task's training images); learning rates, default the mode's;
    ``overrides``: ``key.path=value`` of the section data. ``tell`` follows the work, ``say`` gets lines with loss and
    test score.
    """

    mode: Mode
    data: Mapping[str, str | Path]
    kind: str | None = None
    init: Init | None = None
    epochs: float = 20.0
    steps: int | None = None
    rates: tuple[float, ...] = ()
    batch: int = 128
    weight_decay: float = 0.01
    limit: int | None = None
    seed: int = 0
    checkpoint: str = "latest"
    cache: Path | None = None
    cache_limit: float = CACHE_LIMIT_GB
    overrides: Sequence[str] = ()
    tell: Count | None = field(default=None, compare=False)
    say: Callable[[str], None] | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        for option, value, allowed in (
            ("mode", self.mode, MODES),
            ("init", self.init, (None, *INITS)),
            ("task", self.kind, (None, *KINDS)),
        ):
            if value not in allowed:
                raise UserError(f"--{option} {value}: give one of {', '.join(word for word in allowed if word)}")
        if self.init is not None and not has_predictor(self.mode):
            raise UserError(f"--init: mode {self.mode} has no predictor to initialise; leave --init out")
        if len(self.data) > 1 and self.mode != "multitask":
            raise UserError(f"--data: {len(self.data)} tasks need --mode multitask; give mode {self.mode} one task")
        for rate in self.rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise UserError(f"--lr {rate:g}: give a learning rate above 0")
        check_overrides(self.overrides, command="finetune")


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """Return folders by task name from ``DIR`` (named after it) or ``NAME=DIR``; UserError for a repeated name."""
    named: dict[str, str] = {}
    for word in words:
        name, given = _named(word)
        try:
            place = home_expanded(given)  # shells do not expand NAME=~/photos
        except ValueError as error:
            raise UserError(f"--data: {error}") from error
        key = name if name is not None else (Path(place).resolve().name or "data")
        if not key or key in named:
            raise UserError(f"--data {printable(word)}: two tasks have this name; write NAME=DIR")
        named[key] = place
    if not named:
        raise UserError("--data is missing: give a folder of labelled images, or NAME=DIR for each task")
    return named


def _named(word: str) -> tuple[str | None, str]:
    """Return (task's name or None, its folder). A path may contain "=" (date=1/photos); a name has no slash."""
    name, mark, folder = word.partition("=")
    if not mark or is_address(word) or "/" in name:
        return None, word
    if not Path(word).exists():
        return name, folder
    if folder and (is_address(folder) or Path(folder).exists()):
        raise UserError(
            f"--data: {printable(word)}: there is a folder of this name, and a folder {printable(folder)}; write "
            f"./{printable(word)} for the first, {printable(name)}=./{printable(folder)} for the second"
        )
    return None, word


def finetune_run(
    run: Path,
    request: Request,
    out: Path | None = None,
    environment: Mapping[str, Any] | None = None,
    give: Callable[[dict[str, Any]], None] | None = None,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Fit ``request`` on a run's checkpoint and evaluate it.

    ``out``: a new folder for the result; ``environment`` is recorded in it. ``give`` gets the answer as soon as it is
    known, before weights are written. ``draw`` makes the page in ``out`` (`eval.report.finetune_page`); without it
    there is none.

    Return top1, top5 or miou with intervals (of several tasks under ``tasks``, and their mean), chance, the learning
    rate chosen on held-out images, the protocol, and under ``curve`` training loss and test score during training.
    Raise UserError for whatever the user can fix.
    """
    request.check()
    if out is not None:
        require_absent(out)
    chosen = chosen_checkpoint(run, request.checkpoint)
    run = chosen.run
    model, config, _, step = load_model(run, chosen.which, request.overrides)
    config = for_evaluation(config, request.overrides)
    model.to(default_device())
    if request.mode == "multitask" and not isinstance(model.predictor, VitPredictor):
        raise UserError(f"{run}: its predictor is mlp, and --mode multitask needs vit; choose another --mode")
    cache = FeatureCache(request.cache if request.cache is not None else run / "cache", request.cache_limit)
    named = {name: _task(name, root, model, config, request, cache) for name, root in request.data.items()}
    tasks = [found.task for found in named.values()]
    shapes = {task.name: task.shape for task in tasks}
    init: Init = request.init or "pretrained"
    plan = _plan(request, init, tasks)
    tell = None if request.tell is None else partial(request.tell, f"finetune, {request.mode}")
    began = time.perf_counter()
    build = reader_builder(model, request.mode, init, shapes, default_encoder(config.model))
    found = fit(build, tasks, plan, tell, None if request.say is None else partial(_say, request, plan, tasks))
    seconds = time.perf_counter() - began
    scores = _scores(found, named, plan)
    protocol = _protocol(found, plan, tasks, config, request, seconds)
    results = {
        "mode": request.mode,
        "init": init if has_predictor(request.mode) else None,
        "step": step,
        **scores,
        **protocol,
        **_curve(found, protocol["epochs"], main_figure(scores)),
    }
    if out is None:
        with given(give, results):
            return results
    with given(give, {**results, "out": str(out)}):
        classes = {name: found.classes for name, found in named.items()}
        save_finetuned(
            out,
            found.reader,
            model=config.model,
            mode=request.mode,
            shapes=shapes,
            classes=classes,
            results=results,
            environment=environment or {},
            page=None if draw is None else draw(out.name, results, environment or {}),
        )
    return {**results, "out": str(out)}


@dataclass(frozen=True)
class _Named:
    """A task, its class names, and notes on its images: splits, left_out, reduced."""

    task: Task
    classes: tuple[str, ...]
    data: dict[str, Any]


def _task(name: str, root: str | Path, model: IWM, config: Config, request: Request, cache: FeatureCache) -> _Named:
    dense = is_masked(Path(root)) if request.kind is None else request.kind == "segmentation"
    train, test, smaller = _splits(root, config, dense=dense, limit=request.limit)
    encoder = encoder_of(model, default_encoder(config.model))
    kept = kept_for(request.mode, dense=dense)

    def read(split: Split, words: str) -> Features:
        tell = None if request.tell is None else partial(request.tell, f"{kept} of {name}, {words}")
        return read_features([encoder], split, kept, cache=cache, progress=tell)[0]

    announce([encoder], (train, test), kept, cache)
    features = read(train, "train"), read(test, "test")
    classes = len(train.classes)
    if dense:
        _require_two_numbers(features[0].labels, root)
        classes = 1 + max(int(np.max(part.labels, where=part.labels != IGNORED, initial=0)) for part in features)
    names = tuple(str(number) for number in range(classes)) if dense else train.classes
    said = splits_record(train, test) | ({"reduced": smaller} if smaller else {})
    try:
        return _Named(Task.of(name, HeadShape(classes, dense), *features), names, said)
    except ValueError as error:
        raise UserError(f"{printable(str(root))}: {printable(str(error))}") from error


def _require_two_numbers(masks: np.ndarray, root: str | Path) -> None:
    """Raise UserError if the masks, uint8 (n, S, S), have fewer than two classes: any prediction would be right."""
    low, high = (
        int(find(masks, where=masks != IGNORED, initial=initial)) for find, initial in ((np.min, 255), (np.max, 0))
    )
    if low >= high:
        what = f"only class {high}" if low == high else "no class"
        raise UserError(
            f"{printable(str(root))}: its {len(masks)} training masks have {what} ({IGNORED} is ignored); number the "
            "classes from 0, for example background 0 and foreground 1 instead of 0 and 255"
        )


def _splits(
    root: str | Path, config: Config, *, dense: bool, limit: int | None
) -> tuple[FileSplit | MaskedSplit, FileSplit | MaskedSplit, dict[str, Any]]:
    """Return both splits, of at most ``limit`` training images, and what was reduced."""
    train: FileSplit | MaskedSplit
    test: FileSplit | MaskedSplit
    if dense:
        train, test = open_masked_splits(Path(root), config)
    else:
        train, test = open_splits(root, config, source=config.data.source)
        require_same_classes(train, test)
        if len(train.classes) < 2:
            raise UserError(f"{printable(str(root))}: the images have no classes; sort them into one folder per class")
    if limit is None:
        return train, test, {}
    smaller = {}
    if limit > len(train):
        smaller["limit"] = reduced(limit, len(train), f"there are {len(train)} training images")
    thin = train.thinned(limit)
    if isinstance(thin, FileSplit) and thin.files.labels is not None:
        left = len(np.unique(thin.files.labels))
        if left < len(train.classes):
            why = f"--limit {limit} leaves {len(train.classes) - left} of them without a training image"
            smaller["classes"] = reduced(len(train.classes), left, why)
    return thin, test, smaller


def _plan(request: Request, init: Init, tasks: Sequence[Task]) -> Plan:
    largest = max(int((~task.held).sum()) for task in tasks)
    length = request.epochs * -(-largest // request.batch)
    if request.steps is None and length < 0.5:
        raise UserError(
            f"--epochs {request.epochs:g}: that is {length:.2g} of a step for {largest} training images at --batch "
            f"{request.batch}; give more, or --steps"
        )
    steps = request.steps or max(1, round(length))
    return Plan(
        rates=tuple(dict.fromkeys(request.rates)) or default_rates(request.mode),
        steps=steps,
        batch=request.batch,
        weight_decay=request.weight_decay,
        predictor_factor=PRETRAINED_FACTOR if init == "pretrained" else 1.0,
        encoder_factor=PRETRAINED_FACTOR,
        flip=request.mode == "end-to-end",
        seed=request.seed,
    )


def _scores(found: Fit, named: Mapping[str, _Named], plan: Plan) -> dict[str, Any]:
    """Return test scores; with several tasks each under its name, and the mean of their main metrics."""
    by_task: dict[str, dict[str, Any]] = {}
    main = []
    for one in named.values():
        task, learned = one.task, int((~one.task.held).sum())
        scores = measure(found.reader, task, task.test)
        main.append(scores.main())
        smaller = dict(one.data.get("reduced", {}))
        if plan.batch > learned:
            smaller["batch"] = reduced(plan.batch, learned, f"a step learns from {learned} images at most")
        by_task[task.name] = {
            "task": "segmentation" if task.shape.dense else "classification",
            **scores.summary(),
            **({} if task.shape.dense else {"chance": float(np.bincount(task.test.labels).max() / len(task.test))}),
            "classes": task.shape.classes,
            "train_images": learned,
            "held_out_images": int(task.held.sum()),
            "test_images": len(task.test),
            **one.data,
            **({"reduced": smaller} if smaller else {}),
        }
    if len(named) == 1:
        return next(iter(by_task.values()))
    return {"mean": float(np.mean(main)), "tasks": by_task}


def _say(request: Request, plan: Plan, tasks: Sequence[Task], point: Point) -> None:
    """Report a point of the curve in one line."""
    assert request.say is not None
    kind = "mean score" if len(tasks) > 1 else "mIoU" if tasks[0].shape.dense else "top-1"
    request.say(
        f"finetune, {request.mode}: step {point.step} of {plan.steps}: loss {point.loss:.4f}, test {kind} "
        f"{percent(point.test or 0.0)}"
    )


def _curve(found: Fit, epochs: float, final: float) -> dict[str, Any]:
    """Return loss and test score of the chosen reader during training; the last score is of all test images."""
    steps = found.curve[-1].step
    points = [
        {
            "step": point.step,
            "epoch": epochs * point.step / steps,
            "loss": point.loss,
            "test": final if point is found.curve[-1] else point.test,
        }
        for point in found.curve
    ]
    return {"curve": points, "curve_test_images": found.curve_images}


def _protocol(
    found: Fit, plan: Plan, tasks: Sequence[Task], config: Config, request: Request, seconds: float
) -> dict[str, Any]:
    rows = [int((~task.held).sum()) for task in tasks]
    learned = sum(rows)
    parts = [steps_per_epoch(count, plan.batch) for count in rows]
    seen = sum(plan.steps * count / part for count, part in zip(rows, parts, strict=True))
    with_predictor = has_predictor(request.mode)
    return {
        "encoder": default_encoder(config.model),
        "lr": found.rate,
        "lr_tried": {f"{rate:g}": score for rate, score in found.held_out.items()},
        "predictor_lr": found.rate * plan.predictor_factor if with_predictor else None,
        "encoder_lr": found.rate * plan.encoder_factor if request.mode == "end-to-end" else None,
        "steps": plan.steps,
        "batch": max(-(-count // part) for count, part in zip(rows, parts, strict=True)),
        "epochs": seen / max(1, learned),
        "weight_decay": plan.weight_decay,
        "seed": plan.seed,
        "trained_parameters": sum(p.numel() for p in found.reader.parameters() if p.requires_grad),
        "seconds": seconds,
        "protocol": (
            f"AdamW, warm-up over {WARMUP:.0%} of the steps, cosine to 0; the learning rate is chosen on a held-out "
            "tenth of the training images; clean views"
            + (", half of them mirrored" if plan.flip else " without augmentation")
        ),
    }
