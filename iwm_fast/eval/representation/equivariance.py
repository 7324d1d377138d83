"""Equivariance and invariance of a representation: how much of a transformation it encodes.

Each clean image gives a pair of views under the run's own actions (`view_pairs`). Equivariance: a ridge regression,
solved in closed form on pairs of training images, predicts the action between the views from both pooled embeddings; R²
on pairs of test images, by component and their mean (a component below 0 counts as 0). A flag is regressed as 0 or 1,
so that its R² has the same scale as the others. Sigma and threshold are regressed only on pairs that were blurred or
solarized. flip, 1 if exactly one view is mirrored, is not a sum over both, so its features also have the products of
the embeddings. Components that cannot vary, or hardly do, are left out by name.

Invariance: the cosine of a pair's embeddings on a scale where 1 is "the view changes nothing" and 0 "it changes as much
as another image": (same - other) / (1 - other). The raw cosines are reported too: those of any two images are often
near 1, so alone they mean little.

Sources: regression of the action as in SIE (arXiv:2302.10283), with a linear head instead of its MLP, so that nothing
depends on the head's training; the scale of the cosine is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import ActionsConfig
from iwm_fast.errors import UserError
from iwm_fast.eval.features import POOLING, EncoderName, pooled_features
from iwm_fast.eval.representation.view_pairs import draw_pairs, left_out, left_out_line, only_where
from iwm_fast.eval.ridge import fit_ridge
from iwm_fast.eval.stats import Interval, bootstrap_rows
from iwm_fast.models.iwm import IWM

if TYPE_CHECKING:
    from iwm_fast.eval.image_subject import ImageSubject

__all__ = ["IMAGES", "Equivariance", "evaluate_equivariance", "measure_equivariance"]

Floats = NDArray[np.float64]

# Pairs are of at most this many training and test images, spread evenly.
IMAGES = (2000, 1000)

# Whether exactly one of two views is mirrored is a product of both views' features, not a sum.
_PRODUCT = "flip"
# Training and test pairs are sampled from different parts of the streams.
_TEST_SAMPLES = 2**32


@dataclass(frozen=True)
class Equivariance:
    """R² by component, cosines, and their summary; intervals are of 95 % over the test pairs.

    left_out: components that have no R², and why.
    """

    r2: dict[str, float]
    r2_interval: dict[str, Interval]
    equivariance: float
    equivariance_interval: Interval
    invariance: float
    invariance_interval: Interval
    cosine_same: float
    cosine_other: float
    left_out: dict[str, str]

    def summary(self, end: str = "") -> dict[str, Any]:
        """Return names and values for a table or JSON, with ``end`` behind each name."""
        out: dict[str, Any] = {
            f"equivariance{end}": self.equivariance,
            f"equivariance{end}_interval": list(self.equivariance_interval),
            f"invariance{end}": self.invariance,
            f"invariance{end}_interval": list(self.invariance_interval),
            f"cosine_same{end}": self.cosine_same,
            f"cosine_other{end}": self.cosine_other,
        }
        for name, value in self.r2.items():
            out |= {f"r2_{name}{end}": value, f"r2_{name}{end}_interval": list(self.r2_interval[name])}
        return out


def evaluate_equivariance(subject: ImageSubject) -> dict[str, Any]:
    """Return names and values of the model and of the untrained one, or ``not_run`` with the reason."""
    fitted, measured = subject.learned_from().spread(IMAGES[0]), subject.test.spread(IMAGES[1])
    if len(fitted) < 5 or len(measured) < 2:
        return {"not_run": {"equivariance": f"{len(fitted)} training and {len(measured)} test images are too few"}}
    try:
        found = measure_equivariance(
            subject.models,
            subject.config.actions,
            fitted,
            measured,
            which=subject.which,
            progress=subject.tell("pairs of views"),
        )
    except UserError as error:  # nothing varies: the other evaluations must not be lost
        return {"not_run": {"equivariance": str(error)}}
    results: dict[str, Any] = {
        "equivariance_chance": 0.0,
        "equivariance_encoder": subject.which,
        "equivariance_pooling": POOLING,
        "equivariance_pairs": [len(fitted), len(measured)],
        "equivariance_left_out": found[0].left_out,
    }
    for end, one in zip(("", "_untrained"), found, strict=False):
        results |= one.summary(end)
    return results


def measure_equivariance(
    models: Sequence[IWM],
    actions: ActionsConfig,
    train: Tensor,
    test: Tensor,
    *,
    which: EncoderName,
    chunk: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Equivariance]:
    """Return one result per model, all on the same pairs of the clean images ``train`` and ``test`` (n, S, S, 3) uint8.

    Raise ValueError for fewer than five training or two test images; UserError if no component can be regressed.
    """
    if len(train) < 5 or len(test) < 2:
        raise ValueError(f"train has {len(train)} images and test {len(test)}; five and two are needed")
    total, done = 2 * (len(train) + len(test)), 0
    embedded: list[list[Floats]] = [[] for _ in models]  # of each model: training first, second, test first, second
    moved: list[Floats] = []
    for images, sample in ((train, 0), (test, _TEST_SAMPLES)):
        pairs = draw_pairs(images, actions, first_sample=sample, seed=seed)
        moved.append(pairs.action)
        for views in (pairs.first, pairs.second):
            for rows, found in zip(embedded, pooled_features(models, views, which=which, chunk=chunk), strict=True):
                rows.append(found.double().numpy())
            done += len(views)
            if progress is not None:
                progress(done, total)
    missing = left_out(actions, training=moved[0], test=moved[1])
    if set(missing) >= set(pairs.names):
        raise UserError(f"no component of the action can be regressed from the pairs: {left_out_line(missing)}")
    return [_measure(parts, moved, pairs.names, missing) for parts in embedded]


def _measure(
    parts: Sequence[Floats], moved: Sequence[Floats], components: Sequence[str], missing: dict[str, str]
) -> Equivariance:
    """parts: embeddings of training first and second, test first and second; moved: actions, a column per component."""
    names = tuple(name for name in components if name not in missing)
    error, spread = _squares(parts, moved, components, names)
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-30) for part in parts[2:])
    same = (first * second).sum(axis=1)
    # Half the images away: neighbours in sorted files are of one class.
    other = (first * np.roll(second, max(1, len(second) // 2), axis=0)).sum(axis=1)
    count = len(names)

    def figures(rows: Floats) -> Floats:
        """Map means (m, 2K + 2) of errors, variances and cosines to R² (m, K), equivariance and invariance."""
        r2 = 1 - rows[:, :count] / rows[:, count : 2 * count].clip(1e-30)
        near, far = rows[:, -2], rows[:, -1]
        scaled = (near - far) / (1 - far).clip(1e-12)
        return np.column_stack([r2, r2.clip(0).mean(axis=1), scaled])

    table = np.column_stack([error, spread, same, other])
    value = figures(table.mean(axis=0, keepdims=True))[0]
    ends = bootstrap_rows(table, figures)
    intervals = [(float(low), float(high)) for low, high in zip(*ends, strict=True)]
    return Equivariance(
        r2={name: float(value[i]) for i, name in enumerate(names)},
        r2_interval={name: intervals[i] for i, name in enumerate(names)},
        equivariance=float(value[-2]),
        equivariance_interval=intervals[-2],
        invariance=float(value[-1]),
        invariance_interval=intervals[-1],
        cosine_same=float(same.mean()),
        cosine_other=float(other.mean()),
        left_out=missing,
    )


def _squares(
    parts: Sequence[Floats], moved: Sequence[Floats], components: Sequence[str], names: Sequence[str]
) -> tuple[Floats, Floats]:
    """Return squared errors of the regression of ``names``, and squared differences from the mean: (n, K) each.

    Both are 0 for pairs that a component is not regressed on, which then add nothing to either sum.
    """
    error, spread = np.zeros((2, len(parts[2]), len(names)))
    alike: dict[tuple[bytes, bool], list[int]] = {}  # fitted together: same pairs, same features
    for column, name in enumerate(names):
        asked = b"".join(only_where(action, components, name).tobytes() for action in moved)
        alike.setdefault((asked, name == _PRODUCT), []).append(column)
    for (_, products), columns in alike.items():
        train, test = _features(parts, products=products)
        fitted, measured = (only_where(action, components, names[columns[0]]) for action in moved)
        wanted = [components.index(names[column]) for column in columns]
        truth = moved[1][measured][:, wanted]
        told = fit_ridge(train[fitted], moved[0][fitted][:, wanted]).predict(test[measured])
        rows = np.flatnonzero(measured)[:, None]
        error[rows, columns] = (truth - told) ** 2
        spread[rows, columns] = (truth - truth.mean(axis=0)) ** 2
    return error, spread


def _features(parts: Sequence[Floats], *, products: bool) -> tuple[Floats, Floats]:
    """Concatenate both embeddings of each training and of each test pair, and on request their products by channel."""
    train, test = np.hstack(parts[:2]), np.hstack(parts[2:])
    if not products:
        return train, test
    centre = [part.mean(axis=0) for part in parts[:2]]
    more = [(a - centre[0]) * (b - centre[1]) for a, b in (parts[:2], parts[2:])]
    return np.hstack([train, more[0]]), np.hstack([test, more[1]])
