"""Evaluations of a frozen encoder: k-NN and linear probe on mean tokens, attentive probe on all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.features import POOLING, EncoderName
from iwm_fast.eval.finetune.fitting import WARMUP, Plan, fit, measure
from iwm_fast.eval.finetune.modes import default_rates, reader_builder
from iwm_fast.eval.finetune.tasks import Task
from iwm_fast.eval.held_out import held_out_rows
from iwm_fast.eval.reduced import reduced
from iwm_fast.eval.representation.knn import NEIGHBOURS, knn_classify
from iwm_fast.eval.representation.linear import WEIGHT_DECAYS, linear_probe
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape

if TYPE_CHECKING:
    from iwm_fast.eval.image_subject import ImageSubject

__all__ = ["evaluate_attentive", "evaluate_knn", "evaluate_linear"]

_TOO_FEW = "no class has two training images: none can be held out to choose a setting"
# V-JEPA's attentive probe: 20 epochs, AdamW, weight decay 0.01.
_EPOCHS, _BATCH = 20, 128


def evaluate_knn(subject: ImageSubject) -> dict[str, Any]:
    """Return k-NN of the model and of the untrained one (_untrained): top-1, _interval, protocol."""
    results: dict[str, Any] = {}
    for end, _, x, x_test in subject.features("pooled"):
        results |= _setting(subject, x, x_test) | _knn(x, x_test, end)
    results["knn_chance"] = _chance(x_test)
    if results["knn_k"] < NEIGHBOURS:
        why = f"there are {len(x)} training images"
        results["reduced"] = {"knn_k": reduced(NEIGHBOURS, results["knn_k"], why)}
    return results


def evaluate_linear(subject: ImageSubject) -> dict[str, Any]:
    """Return the linear probe of both, likewise: also _top5, and the weight decay chosen on held-out images."""
    results: dict[str, Any] = {}
    for end, _, x, x_test in subject.features("pooled"):
        results |= _setting(subject, x, x_test)
        if not _can_hold_out(x):
            return results | {"not_run": {"linear": _TOO_FEW}}
        results |= _linear(x, x_test, end)
    return results | {"linear_chance": _chance(x_test)}


def evaluate_attentive(subject: ImageSubject) -> dict[str, Any]:
    """Return the attentive probe of both, likewise, on all tokens."""
    results: dict[str, Any] = {}
    for end, model, x, x_test in subject.features("tokens"):
        results |= _setting(subject, x, x_test)
        if not _can_hold_out(x):
            return results | {"not_run": {"attentive": _TOO_FEW}}
        tell = subject.tell(f"attentive probe{end.replace('_', ', ')}")
        classes = len(subject.learned_from().classes)
        task = Task.of("probe", HeadShape(classes, dense=False), x, x_test)
        results |= _attentive(model, subject.which, task, end, tell)
    return results | {"attentive_chance": _chance(x_test)}


def _setting(subject: ImageSubject, train: Features, test: Features) -> dict[str, Any]:
    """Return the facts about the data that go with every probe."""
    return {
        "encoder": subject.which,
        "pooling": POOLING,
        "classes": len(subject.learned_from().classes),
        "train_images": len(train),
        "test_images": len(test),
    }


def _chance(test: Features) -> float:
    """Return the share of the most frequent class: the accuracy of a constant prediction."""
    return float(np.bincount(test.labels).max() / len(test))


def _can_hold_out(train: Features) -> bool:
    """Return whether some images can be held out to choose a setting, with two left to train on."""
    held = held_out_rows(train.labels)
    return bool(held.any()) and int((~held).sum()) > 1


def _in_memory(features: Features) -> tuple[Tensor, np.ndarray]:
    """Return copies: a mapped file may be read-only, and torch has no such tensors."""
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
            f"{_EPOCHS} epochs in batches of {_BATCH}, weight decay {plan.weight_decay:g}, warm-up over {WARMUP:.0%} "
            f"of the steps, cosine to 0, no augmentation; of {len(plan.rates)} learning rates in one pass the best on "
            "a held-out tenth of the training images"
        ),
    }
