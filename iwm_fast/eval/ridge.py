"""Ridge regression in closed form, with the ridge that predicts held-out rows best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIDGES", "LinearFit", "column_variance", "fit_ridge"]

Floats = NDArray[np.float64]

# In units of the mean squared error, on features and targets of unit variance.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2


@dataclass(frozen=True, eq=False)
class LinearFit:
    """y = x · weight + intercept. weight: (F, K); intercept: (K,). r2: (K,), on the held-out rows, before the fit on
    all; 0 where a target is the same in all of them.
    """

    weight: Floats
    intercept: Floats
    r2: Floats

    def predict(self, x: Floats) -> Floats:
        """Return predictions (m, K) of rows (m, F)."""
        return np.asarray(x @ self.weight + self.intercept)


def fit_ridge(x: Floats, y: Floats, held: NDArray[np.bool_] | None = None) -> LinearFit:
    """Fit y (n, K) from x (n, F).

    Features and targets are standardised by the training rows, the intercept is free. For each target the best of
    RIDGES on the ``held`` rows, bool (n,), is chosen, then fitted on all rows. By default they are the last fifth of a
    fixed permutation.
    """
    if held is None:
        order = np.random.default_rng(0).permutation(len(x))
        kept_rows, held_rows = np.split(order, [len(x) - max(1, round(HELD_OUT * len(x)))])
    else:
        kept_rows, held_rows = np.flatnonzero(~held), np.flatnonzero(held)
    tried, truth = _Ridge(x[kept_rows], y[kept_rows]), y[held_rows]
    answers = (x[held_rows] @ weight + intercept for weight, intercept in map(tried.solve, RIDGES))
    errors = np.stack([((answer - truth) ** 2).mean(axis=0) for answer in answers])  # (ridges, K)
    spread, varies = column_variance(truth)
    r2 = np.where(varies, 1 - errors.min(axis=0) / spread, 0.0)
    return LinearFit(*_Ridge(x, y).solve(np.array(RIDGES)[errors.argmin(axis=0)]), r2)


def column_variance(y: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return (the variance of each column of (n, K), 1 where it is constant; whether it varies, bool (K,))."""
    spread = y.var(axis=0)
    varies = spread > 1e-12 * np.square(y).mean(axis=0).clip(1e-300)
    return np.where(varies, spread, 1.0), varies


class _Ridge:
    """The solutions for every ridge from one eigendecomposition: of the features' covariance, or where there are more
    features than rows, of the rows' inner products.
    """

    def __init__(self, x: Floats, y: Floats) -> None:
        self._x_mean, self._y_mean = x.mean(axis=0), y.mean(axis=0)
        spread = x.std(axis=0)
        # A constant channel would turn rounding into a feature.
        self._x_scale = np.where(spread > 1e-6 * spread.max(initial=0), 1 / spread.clip(1e-30), 0.0)
        rows = (x - self._x_mean) * self._x_scale
        wanted, count = y - self._y_mean, len(x)
        if x.shape[1] <= count:
            self._variance, self._axes = np.linalg.eigh(rows.T @ rows / count)
            self._moment = self._axes.T @ (rows.T @ wanted) / count
        else:  # (XᵀX + r)⁻¹ Xᵀ y = Xᵀ (XXᵀ + r)⁻¹ y
            self._variance, axes = np.linalg.eigh(rows @ rows.T / count)
            self._axes, self._moment = rows.T @ axes, axes.T @ wanted / count

    def solve(self, ridge: float | Floats) -> tuple[Floats, Floats]:
        """Return weight (F, K) and intercept (K,), on the features' own scale, of one ridge or one per target (K,)."""
        weight = (self._axes @ (self._moment / (self._variance.clip(0)[:, None] + ridge))) * self._x_scale[:, None]
        return weight, self._y_mean - self._x_mean @ weight
