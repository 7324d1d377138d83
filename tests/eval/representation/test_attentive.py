"""The attentive probe reads tokens in half precision."""

from __future__ import annotations

import numpy as np
import torch
from worlds import tiny_config, tiny_model

from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.finetune.fitting import Plan, fit
from iwm_fast.eval.finetune.modes import reader_builder
from iwm_fast.eval.finetune.tasks import Task, in_order
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.models.task_model import HeadShape


def tokens(model, count):
    """Two classes of noise: the upper or the lower half is brighter, by as much as the noise's std."""
    numbers = np.random.default_rng(0)
    labels = np.arange(count) % 2
    size = model.encoder.image
    images = numbers.normal(100, 40, (count, size, size, 3))
    for image, label in zip(images, labels, strict=True):
        image[label * size // 2 :][: size // 2] += 40
    images = images.clip(0, 255)
    with torch.inference_mode():
        out = model.encoder(torch.from_numpy(images.astype(np.uint8)))
    return out.unflatten(0, (count, -1)).float().numpy(), labels


def logits(model, values, labels):
    rows = evenly_spaced(48, len(labels))
    test = np.setdiff1d(np.arange(len(labels)), rows)
    parts = (Features(values[part], labels[part]) for part in (rows, test))
    task = Task.of("probe", HeadShape(2, dense=False), *parts)
    plan = Plan(rates=(1e-2,), steps=60, batch=24)
    found = fit(reader_builder(model, "attentive", "pretrained", {"probe": task.shape}, "context"), [task], plan)
    with torch.inference_mode():
        return torch.cat([found.reader(inputs, "probe") for inputs, _ in in_order(task.test)]), labels[test]


def test_tokens_in_half_precision_give_the_logits_and_the_score_of_full_precision():
    """A token's last bit in half precision is 5e-4 of it; training from the same seed amplifies that a little."""
    model, _ = tiny_model(tiny_config())
    values, labels = tokens(model, 120)
    full, truth = logits(model, values, labels)
    half, _ = logits(model, values.astype(np.float16), labels)
    assert not torch.equal(half, full)
    assert float((half - full).abs().max()) < 0.02 * float(full.std())
    right = [int((one.argmax(dim=1).numpy() == truth).sum()) for one in (full, half)]
    assert abs(right[0] - right[1]) <= 1
    assert right[0] > 0.6 * len(truth)
