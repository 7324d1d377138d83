"""What a frozen encoder is worth: k-NN and linear probe on mean tokens, attentive probe on all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.console import Count
from iwm_fast.eval.finetune.fitting import WARMUP, Plan, fit, measure
from iwm_fast.eval.finetune.modes import default_rates, reader_builder
from iwm_fast.eval.finetune.tasks import Task
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.representation.cache import FeatureCache, Features
from iwm_fast.eval.representation.features import EncoderName, Kept, encoder_of, read_features
from iwm_fast.eval.representation.knn import NEIGHBOURS, knn_classify
from iwm_fast.eval.representation.linear import WEIGHT_DECAYS, held_out_rows, linear_probe
from iwm_fast.eval.splits import Split
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape

__all__ = ["POOLING", "PROBES", "measure_representation"]

PROBES = ("knn", "linear", "attentive")
POOLING = "mean of all tokens"
_TOO_FEW = "no class has two training images, so none can be held out to choose a setting by"
# V-JEPA's attentive probe: 20 passes, AdamW, weight decay 0.01.
_EPOCHS, _BATCH = 20, 128


def measure_representation(
    models: Sequence[IWM],
    which: EncoderName,
    train: Split,
    test: Split,
    probes: Sequence[str],
    *,
    cache: FeatureCache | None = None,
    progress: Count | None = None,
) -> dict[str, Any]:
    """Names and values of ``probes`` for one or two models, of which the second is the untrained one (_untrained).

    Each probe has its top-1 under its own name, with _interval, _top5 where it has one, what was chosen on a tenth of
    the training images, and its protocol under ``NAME_protocol``.
    """
    results: dict[str, Any] = {
        "encoder": which,
        "pooling": POOLING,
        "classes": len(train.classes),
    }

    def read(keep: Kept) -> tuple[list[Features], list[Features]]:
        encoders = [encoder_of(model, which) for model in models]
        tell = [None if progress is None else partial(progress, f"features, {name}") for name in ("train", "test")]
        both = [
            read_features(encoders, split, keep, cache=cache, progress=told)
            for split, told in zip((train, test), tell, strict=True)
        ]
        return both[0], both[1]

    not_run: dict[str, str] = {}
    if "knn" in probes or "linear" in probes:
        for end, x, x_test in zip(("", "_untrained"), *read("pooled"), strict=False):
            results |= _sizes(x, x_test)
            if "knn" in probes:
                results |= _knn(x, x_test, end)
            if "linear" in probes and _can_hold_out(x):
                results |= _linear(x, x_test, end)
            elif "linear" in probes:
                not_run["linear"] = _TOO_FEW
    if "attentive" in probes:
        for end, model, x, x_test in zip(("", "_untrained"), models, *read("tokens"), strict=False):
            results |= _sizes(x, x_test)
            if not _can_hold_out(x):
                not_run["attentive"] = _TOO_FEW
                continue
            tell = None if progress is None else partial(progress, f"attentive probe{end.replace('_', ', ')}")
            task = Task.of("probe", HeadShape(len(train.classes), dense=False), x, x_test)
            results |= _attentive(model, which, task, end, tell)
    # The share of the commonest class: what an answer that never looks at the image would get.
    share = float(np.bincount(x_test.labels).max() / len(x_test))
    results |= {f"{probe}_chance": share for probe in probes if probe not in not_run}
    if results.get("knn_k", NEIGHBOURS) < NEIGHBOURS:
        why = f"there are {results['train_images']} training images"
        results["reduced"] = {"knn_k": reduced(NEIGHBOURS, results["knn_k"], why)}
    return results | ({"not_run": not_run} if not_run else {})


def _can_hold_out(train: Features) -> bool:
    """Whether some images can be held out to choose a setting by, and two are left to learn from."""
    held = held_out_rows(train.labels)
    return bool(held.any()) and int((~held).sum()) > 1


def _sizes(train: Features, test: Features) -> dict[str, int]:
    return {"train_images": len(train), "test_images": len(test)}


def _in_memory(features: Features) -> tuple[Tensor, np.ndarray]:
    """Copies: what is mapped from a file may be read only, and torch has no such tensors."""
    return torch.from_numpy(np.array(features.values)), np.array(features.labels)


def _knn(train: Features, test: Features, end: str) -> dict[str, Any]:
    found = knn_classify(*_in_memory(train), *_in_memory(test))
    return {
        f"knn{end}": found.weighted,
        f"knn{end}_interval": list(found.weighted_interval),
        f"knn_plain{end}": found.plain,
        f"knn_plain{end}_interval": list(found.plain_interval),
        "knn_k": found.neighbours,
        "knn_temperature": found.temperature,
        "knn_protocol": "DINO's: the k cosine-nearest training images vote, each by exp(cosine / temperature)",
    }


def _linear(train: Features, test: Features, end: str) -> dict[str, Any]:
    found = linear_probe(*_in_memory(train), *_in_memory(test))
    return {
        f"linear{end}": found.top1,
        f"linear{end}_interval": list(found.top1_interval),
        f"linear_top5{end}": found.top5,
        f"linear_top5{end}_interval": None if found.top5_interval is None else list(found.top5_interval),
        f"linear_weight_decay{end}": found.weight_decay,
        "linear_protocol": (
            f"multinomial regression on standardised mean tokens, solved (L-BFGS) for {len(WEIGHT_DECAYS)} weight "
            "decays; the decay is chosen on a tenth of the training images"
        ),
    }


def _attentive(model: IWM, which: EncoderName, task: Task, end: str, tell: Any) -> dict[str, Any]:
    learned = int((~task.held).sum())
    plan = Plan(rates=default_rates("attentive"), steps=_EPOCHS * -(-learned // _BATCH), batch=_BATCH)
    found = fit(reader_builder(model, "attentive", "pretrained", {task.name: task.shape}, which), [task], plan, tell)
    scores = measure(found.reader, task, task.test).summary()
    return {
        f"attentive{end}": scores["top1"],
        f"attentive{end}_interval": scores["top1_interval"],
        f"attentive_top5{end}": scores["top5"],
        f"attentive_top5{end}_interval": scores["top5_interval"],
        f"attentive_lr{end}": found.rate,
        f"attentive_held_out{end}": found.held_out[found.rate],
        "attentive_protocol": (
            f"a learned query's cross-attention over all tokens, MLP and linear layer (V-JEPA's probe); AdamW, "
            f"{_EPOCHS} passes in batches of {_BATCH}, weight decay {plan.weight_decay:g}, warm-up over {WARMUP:.0%} "
            f"of the steps, cosine to 0, no augmentation; of {len(plan.rates)} learning rates in one pass the best on "
            "a tenth of the training images, from which no step learns"
        ),
    }
