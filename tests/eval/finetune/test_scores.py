from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from iwm_fast.eval.finetune.scores import IGNORED, Scores, counts_per_image, mean_iou, mean_iou_interval, task_loss

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extras: test)")


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 6))
def test_mean_iou_is_scikit_learns_jaccard_score(seed, classes):
    """Over the classes that are in a mask or a prediction; pixels without a class are left out."""
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, classes, (3, 5, 5)).astype(np.uint8)
    answers = np.where(rng.random(masks.shape) < 0.5, masks, rng.integers(0, classes, masks.shape)).astype(np.uint8)
    masks[rng.random(masks.shape) < 0.2] = IGNORED
    known = masks != IGNORED
    found = mean_iou(counts_per_image(answers, masks, classes).sum(axis=0))
    present = sorted({*masks[known].tolist(), *answers[known].tolist()})
    want = metrics.jaccard_score(masks[known], answers[known], average="macro", labels=present)
    assert found == pytest.approx(want, abs=1e-12)


def test_a_perfect_answer_scores_one_and_its_interval_has_no_width():
    masks = np.random.default_rng(0).integers(0, 4, (9, 6, 6)).astype(np.uint8)
    counts = counts_per_image(masks, masks, 5)
    assert mean_iou(counts.sum(axis=0)) == 1
    assert mean_iou_interval(counts) == (1, 1)


def test_the_interval_is_that_of_resampled_images():
    """Compared with the resampling written out."""
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 3, (40, 4, 4)).astype(np.uint8)
    answers = np.where(rng.random((40, 1, 1)) < 0.6, masks, rng.integers(0, 3, masks.shape)).astype(np.uint8)
    counts = counts_per_image(answers, masks, 3)
    drawn = [mean_iou(counts[rng.integers(0, 40, 40)].sum(axis=0)) for _ in range(4000)]
    assert mean_iou_interval(counts) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_loss_is_cross_entropy_over_the_known_pixels_at_the_masks_size():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    masks[0, :3] = IGNORED
    enlarged = F.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False)
    want = F.cross_entropy(enlarged, masks, ignore_index=IGNORED)
    torch.testing.assert_close(task_loss(logits, masks), want)
    assert task_loss(logits, torch.full_like(masks, IGNORED)) == 0
    labels = torch.tensor([2, 0])
    torch.testing.assert_close(task_loss(logits[..., 0, 0], labels), F.cross_entropy(logits[..., 0, 0], labels))


def test_accuracies_count_the_first_and_the_five_first():
    logits = torch.arange(7.0).repeat(4, 1)  # class 6 first, then 5, 4, 3, 2
    scores = Scores(7, dense=False)
    scores.add(logits[:2], torch.tensor([6, 2]))
    scores.add(logits[2:], torch.tensor([1, 6]))
    found = scores.summary()
    assert (found["top1"], found["top5"], scores.main()) == (0.5, 0.75, 0.5)
    assert found["top1_interval"][0] <= 0.5 <= found["top1_interval"][1]
    few = Scores(5, dense=False)
    few.add(logits[:, :5], torch.tensor([4, 0, 0, 0]))
    assert (few.summary()["top1"], few.summary()["top5"]) == (0.25, None)
