"""Scores of predictions: accuracy of classes, intersection over union of segments, each with a bootstrap interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iwm_fast.eval.stats import CONFIDENCE, RESAMPLES, Interval, bootstrap_interval

__all__ = ["IGNORED", "Scores", "counts_per_image", "mean_iou", "mean_iou_interval", "task_loss"]

IGNORED = 255  # pixels without a class (void in PASCAL VOC and ADE20K)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return mean cross-entropy of logits (B, C) and labels (B,), or of (B, C, G, G), upsampled bilinearly to masks
    (B, S, S); pixels of class 255 are ignored (a batch of nothing else has loss 0).
    """
    if logits.ndim == 4:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return losses / (labels != IGNORED).sum().clamp(min=1)


def counts_per_image(answers: np.ndarray, masks: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels of each class by image: int64 (B, 3, C), in both, in the prediction, in the mask; 255 is ignored.

    answers, masks: uint8 (B, S, S).
    """
    counts = np.zeros((len(masks), 3, classes), np.int64)
    for image, (answer, mask) in enumerate(zip(answers, masks, strict=True)):
        known = mask != IGNORED
        told, true = answer[known], mask[known]
        for row, values in enumerate((true[told == true], told, true)):
            counts[image, row] = np.bincount(values, minlength=classes)[:classes]
    return counts


def mean_iou(counts: np.ndarray) -> Any:
    """Return the mean over classes of intersection / union, from sums of counts (…, 3, C), float64 (…). Classes in no
    mask and no prediction are left out.
    """
    both, told, true = np.moveaxis(counts, -2, 0)
    union = told + true - both
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(union > 0, both / np.maximum(union, 1), np.nan), axis=-1)


def mean_iou_interval(counts: np.ndarray) -> Interval:
    """Percentile bootstrap over images of counts (n, 3, C): 95 %, 1,000 resamples, a fixed seed."""
    generator = np.random.default_rng(0)
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    drawn = np.stack(
        [np.bincount(generator.integers(0, len(counts), len(counts)), minlength=len(counts)) for _ in range(RESAMPLES)]
    )
    values = mean_iou((drawn @ flat).reshape(RESAMPLES, *counts.shape[1:]))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


class Scores:
    """Collects predictions batch by batch. ``classes``: their number; ``dense``: whether each pixel has one."""

    def __init__(self, classes: int, *, dense: bool) -> None:
        self.classes = classes
        self.dense = dense
        self._parts: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch, with shapes as in `task_loss`."""
        if self.dense:
            enlarged = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            told = enlarged.argmax(dim=1).to(torch.uint8).cpu().numpy()
            self._parts.append(counts_per_image(told, labels.cpu().numpy().astype(np.uint8), self.classes))
            return
        order = logits.topk(min(5, self.classes), dim=1).indices == labels[:, None]
        self._parts.append(np.stack([order[:, 0].cpu().numpy(), order.any(dim=1).cpu().numpy()], axis=1))

    def main(self) -> float:
        """The metric that chooses learning rates: top-1 accuracy, or mean intersection over union."""
        return float(mean_iou(self._all().sum(axis=0))) if self.dense else float(self._all()[:, 0].mean())

    def summary(self) -> dict[str, Any]:
        """Return names and values: top1, top5 (None up to five classes), or miou and pixel_accuracy; intervals."""
        found = self._all()
        if self.dense:
            total = found.sum(axis=0)
            return {
                "miou": self.main(),
                "miou_interval": list(mean_iou_interval(found)),
                "pixel_accuracy": float(total[0].sum() / max(1, total[2].sum())),
            }
        hits = found.astype(np.float64)
        five = self.classes > 5
        return {
            "top1": self.main(),
            "top1_interval": list(bootstrap_interval(hits[:, 0])),
            "top5": float(hits[:, 1].mean()) if five else None,
            "top5_interval": list(bootstrap_interval(hits[:, 1])) if five else None,
        }

    def _all(self) -> np.ndarray:
        return np.concatenate(self._parts)
