"""Linear probe: multinomial logistic regression on frozen, standardised features.

The problem is convex, so it is solved, not scheduled: full-batch L-BFGS along a path of weight decays from strong to
weak, each warm-started from the last solution. The decay is chosen on a tenth of the training images, held out by
class; the probe is then fitted on all of them. The test images are used once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iwm_fast.eval.held_out import held_out_rows
from iwm_fast.eval.stats import Interval, bootstrap_interval

__all__ = ["WEIGHT_DECAYS", "LinearResult", "linear_probe"]

# In units of the mean cross-entropy, on features of unit variance. The weak end matters: an untrained network's 128
# features are so nearly low-dimensional that its accuracy rose from 38 to 43 % between 1e-5 and 1e-8.
WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_ITERATIONS = 100  # per decay; 10,000 x 128 of ten classes converged within 40
_ROWS = 2**15  # rows at once: the logits of 1,000 classes then take 128 MiB


@dataclass(frozen=True)
class LinearResult:
    """Accuracies in [0, 1] on the test images; top5 is None with five classes or fewer."""

    top1: float
    top1_interval: Interval
    top5: float | None
    top5_interval: Interval | None
    weight_decay: float
    held_out_top1: float


class _Probe:
    """Multinomial regression on ``rows`` (n, D) in the principal axes of the features, with variance (D,) along each.

    The unknowns are scaled so that the curvature is near one along every axis (Böhning's bound on the Hessian of the
    softmax is half the covariance). Features of an untrained network are so correlated that without this L-BFGS still
    improves after 300 iterations, and the accuracy would depend on their number. ``weight`` is (D + 1, C), the last row
    the bias.
    """

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, variance: Tensor) -> None:
        self.rows = rows
        self.labels = labels
        self.variance = variance
        self.weight = torch.zeros(rows.shape[1] + 1, classes, device=rows.device)

    def fit(self, decay: float) -> None:
        """Minimise mean cross-entropy + decay / 2 · ‖W‖² from the current weights; the bias is not decayed."""
        scale = torch.cat([(self.variance / 2 + decay).rsqrt(), self.variance.new_full((1,), 2**0.5)])[:, None]
        unknown = self.weight / scale
        unknown.grad = torch.zeros_like(unknown)
        solver = torch.optim.LBFGS(
            [unknown],
            max_iter=_ITERATIONS,
            history_size=10,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def loss() -> float:
            value, slope = self._loss(unknown * scale, decay)
            unknown.grad = slope * scale
            return value

        solver.step(loss)
        self.weight = unknown * scale

    def _loss(self, weight: Tensor, decay: float) -> tuple[float, Tensor]:
        """Return the loss and its gradient (D + 1, C), computed in blocks of rows."""
        slope = weight * decay
        slope[-1] = 0
        total = 0.5 * decay * weight[:-1].square().sum().double()
        for rows, labels in zip(self.rows.split(_ROWS), self.labels.split(_ROWS), strict=True):
            log_p = F.log_softmax(_logits(rows, weight), dim=1)  # (b, C)
            total -= log_p.gather(1, labels[:, None]).sum().double() / len(self.rows)
            error = log_p.exp_()
            error[torch.arange(len(labels), device=labels.device), labels] -= 1
            slope[:-1] += rows.T @ error / len(self.rows)
            slope[-1] += error.sum(dim=0) / len(self.rows)
        return float(total), slope


def _principal(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both standardised by the training features and rotated to principal axes, and the variance along each.

    A rotation changes neither the problem nor its solution's accuracy: ‖W‖ stays. Constant channels become 0.
    """
    mean, spread = train.mean(dim=0), train.std(dim=0)
    # Dividing a constant channel by its std would only turn rounding into a feature.
    inverse = torch.where(spread > 1e-6 * spread.max(), 1 / spread.clamp(min=1e-30), torch.zeros_like(spread))
    x, x_test = (train - mean) * inverse, (test - mean) * inverse
    covariance = sum((part.T @ part) / len(x) for part in map(Tensor.double, x.split(_ROWS)))
    variance, axes = torch.linalg.eigh(covariance)
    axes = axes.float()
    return x @ axes, x_test @ axes, variance.clamp(min=0).float()


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(weight[-1], rows, weight[:-1])


def _hits(rows: Tensor, labels: Tensor, weight: Tensor, k: int) -> np.ndarray:
    """Return whether each row's label is among the k largest logits: float64 (n,)."""
    found = [
        (_logits(block, weight).topk(k, dim=1).indices == truth[:, None]).any(dim=1)
        for block, truth in zip(rows.split(_ROWS), labels.split(_ROWS), strict=True)
    ]
    return torch.cat(found).double().cpu().numpy()


def linear_probe(
    train: Tensor,
    train_labels: np.ndarray,
    test: Tensor,
    test_labels: np.ndarray,
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> LinearResult:
    """Fit on ``train`` (n, D), measure on ``test`` (m, D); labels int64 of matching length. Float32 throughout.

    Raise ValueError if rows and labels differ in number, no class has two training images, or a decay is 0.
    """
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if len(rows) != len(labels) or not len(rows):
            raise ValueError(f"{name} has {len(rows)} rows and {len(labels)} labels; they must be equal and not 0")
    held = held_out_rows(train_labels)
    if min(weight_decays) <= 0:
        raise ValueError(f"weight_decays is {list(weight_decays)}; each must be above 0")
    if not held.any():
        raise ValueError("no class of train_labels has two images: none can be held out to choose the weight decay")
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    device = train.device
    x, x_test, variance = _principal(train.float(), test.float())
    y, y_test = (torch.from_numpy(np.asarray(a, dtype=np.int64)).to(device) for a in (train_labels, test_labels))
    decays = sorted(weight_decays, reverse=True)
    mask = torch.from_numpy(held).to(device)
    with torch.no_grad():
        chooser = _Probe(x[~mask], y[~mask], classes, variance)
        scores = []
        for decay in decays:
            chooser.fit(decay)
            scores.append(float(_hits(x[mask], y[mask], chooser.weight, 1).mean()))
        best = int(np.argmax(scores))  # ties go to the strongest decay
        probe = _Probe(x, y, classes, variance)
        for decay in decays[: best + 1]:
            probe.fit(decay)
        top1 = _hits(x_test, y_test, probe.weight, 1)
        top5 = _hits(x_test, y_test, probe.weight, 5) if classes > 5 else None
    return LinearResult(
        top1=float(top1.mean()),
        top1_interval=bootstrap_interval(top1),
        top5=None if top5 is None else float(top5.mean()),
        top5_interval=None if top5 is None else bootstrap_interval(top5),
        weight_decay=decays[best],
        held_out_top1=scores[best],
    )
