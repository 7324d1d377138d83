"""One call that measures a model: MRR of its world model, k-NN and linear probe of its frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions import ActionSpace
from iwm_fast.config import Config
from iwm_fast.eval.bank import varying
from iwm_fast.eval.features import EncoderName, default_encoder, device_of, pooled_features
from iwm_fast.eval.knn import knn_classify
from iwm_fast.eval.linear import linear_probe
from iwm_fast.eval.mrr import mean_reciprocal_rank
from iwm_fast.eval.splits import Split, open_splits
from iwm_fast.models.iwm import IWM

__all__ = ["POOLING", "WHAT", "Progress", "evaluate_model", "evaluate_monitor", "untrained_model"]

WHAT = ("mrr", "knn", "linear")
POOLING = "mean of all tokens"
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def untrained_model(config: Config, space: ActionSpace, device: torch.device) -> IWM:
    """The run's network as it was before its first step. The caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):  # parameters are drawn on the CPU
        torch.manual_seed(config.train.seed)
        return IWM(config.model, space.dim).to(device)


def evaluate_model(
    model: IWM,
    config: Config,
    space: ActionSpace,
    *,
    test: Split,
    train: Split | None = None,
    what: Sequence[str] = WHAT,
    untrained: bool = True,
    encoder: EncoderName | None = None,
    images: int | None = None,
    queries: int | None = None,
    components: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``what`` and return names and values, with the protocol beside them, ready for a table or JSON.

    MRR: of ``images`` (default ``eval.mrr_images``) spread evenly over ``test``, on banks of ``eval.bank``; names in
    ``MrrResult.summary``. ``components``: also ``mrr_only_brightness`` and so on, of banks that vary one component.
    k-NN and probe: fitted on ``train``, measured on ``test``; knn, linear, linear_top5, each with _interval, and with
    _untrained the same of the network before training. ``encoder``: default the moving average, where there is one.
    What cannot be measured stands under ``not_run`` with its reason. Raises ValueError for an unknown ``what``.
    """
    unknown = [name for name in what if name not in WHAT]
    if unknown:
        raise ValueError(f"what has {unknown[0]!r}; it may have {', '.join(WHAT)}")
    results: dict[str, Any] = {}
    if "mrr" in what and not varying(config.actions):
        results["not_run"] = {
            "mrr": "the configuration has no colour jitter (actions.strength), so no distinct actions"
        }
    elif "mrr" in what:
        banked = test.spread(images if images is not None else config.eval.mrr_images)
        results |= _world_model(model, config, space, banked, queries, components, progress)
    probes = [name for name in ("knn", "linear") if name in what]
    missing = _cannot_classify(train, test)
    if probes and train is not None and missing is None:
        which = encoder if encoder is not None else default_encoder(config.model)
        models = [model] + ([untrained_model(config, space, device_of(model))] if untrained else [])
        results |= _representation(models, which, train, test, probes, progress)
    elif probes:
        results["not_run"] = results.get("not_run", {}) | dict.fromkeys(probes, missing)
    return results


def evaluate_monitor(model: IWM, config: Config, space: ActionSpace, root: str | Path) -> dict[str, Any]:
    """k-NN and MRR while training, on at most ``eval.images`` of each split: a few numbers for metrics.jsonl.

    Keys: mrr, mrr_shuffled, mrr_chance, and knn, knn_chance where ``root`` has classes.
    """
    train, test = open_splits(root, config, limit=config.eval.images)
    results = evaluate_model(model, config, space, train=train, test=test, what=("mrr", "knn"), untrained=False)
    kept = ("mrr", "mrr_shuffled", "mrr_chance", "knn", "knn_chance")
    return {key: results[key] for key in kept if key in results}


def _world_model(
    model: IWM,
    config: Config,
    space: ActionSpace,
    banked: Tensor,
    queries: int | None,
    components: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for vary in (None, *varying(config.actions)) if components else (None,):
        tell = None if progress is None else partial(progress, "mrr" if vary is None else f"mrr, {vary} only")
        found = mean_reciprocal_rank(
            model,
            config,
            space,
            banked,
            bank=config.eval.bank,
            queries=queries,
            vary=vary,
            progress=tell,
        )
        results |= found.summary() if vary is None else {f"mrr_only_{vary}": found.mrr()}
    return results


def _cannot_classify(train: Split | None, test: Split) -> str | None:
    """Why k-NN and probe cannot run, or None."""
    if train is None:
        return "no training images were given"
    if len(train.classes) < 2:
        return "the images have no classes (a folder a class is needed)"
    if train.classes != test.classes:
        return f"train has {len(train.classes)} classes and test has {len(test.classes)}: they are not the same"
    return None


def _read(
    models: Sequence[IWM], which: EncoderName, split: Split, name: str, progress: Progress | None
) -> tuple[list[Tensor], np.ndarray]:
    """Features (n, D) of each model and labels (n,), in one pass over the split."""
    labels: list[np.ndarray] = []

    def images() -> Iterator[Tensor]:
        done = 0
        for batch, batch_labels in split.read():
            labels.append(batch_labels)
            yield batch
            done += len(batch)
            if progress is not None:
                progress(f"features, {name}", done, len(split))

    features = pooled_features(models, images(), which=which)
    return features, np.concatenate(labels)


def _representation(
    models: Sequence[IWM],
    which: EncoderName,
    train: Split,
    test: Split,
    probes: Sequence[str],
    progress: Progress | None,
) -> dict[str, Any]:
    train_features, train_labels = _read(models, which, train, "train", progress)
    test_features, test_labels = _read(models, which, test, "test", progress)
    results: dict[str, Any] = {
        "encoder": which,
        "pooling": POOLING,
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "classes": len(train.classes),
    }
    # The share of the commonest class: what an answer that never looks at the image would get.
    share = float(np.bincount(test_labels).max() / len(test_labels))
    for end, x, x_test in zip(("", "_untrained"), train_features, test_features, strict=False):
        if "knn" in probes:
            results |= {**_knn(x, train_labels, x_test, test_labels, end), "knn_chance": share}
        if "linear" in probes:
            results |= {**_linear(x, train_labels, x_test, test_labels, end), "linear_chance": share}
    return results


def _knn(x: Tensor, y: np.ndarray, x_test: Tensor, y_test: np.ndarray, end: str) -> dict[str, Any]:
    found = knn_classify(x, y, x_test, y_test)
    return {
        f"knn{end}": found.weighted,
        f"knn{end}_interval": list(found.weighted_interval),
        f"knn_plain{end}": found.plain,
        f"knn_plain{end}_interval": list(found.plain_interval),
        "knn_k": found.neighbours,
        "knn_temperature": found.temperature,
    }


def _linear(x: Tensor, y: np.ndarray, x_test: Tensor, y_test: np.ndarray, end: str) -> dict[str, Any]:
    found = linear_probe(x, y, x_test, y_test)
    return {
        f"linear{end}": found.top1,
        f"linear{end}_interval": list(found.top1_interval),
        f"linear_top5{end}": found.top5,
        f"linear_top5{end}_interval": None if found.top5_interval is None else list(found.top5_interval),
        f"linear_weight_decay{end}": found.weight_decay,
    }
