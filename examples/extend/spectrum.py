"""An evaluation: how many principal directions hold 90 % of the variance of an encoder's features."""

from typing import Any

import numpy as np

from iwm_fast.eval.image_subject import ImageSubject
from iwm_fast.eval.registry import Evaluation, Measure, register


def directions(features: np.ndarray, share: float = 0.9) -> int:
    """The least number of directions with that share of the variance of features (N, D)."""
    variances = np.linalg.svd(features - features.mean(axis=0), compute_uv=False) ** 2
    return 1 + int(np.searchsorted(np.cumsum(variances), share * variances.sum()))


def measure(subject: ImageSubject) -> dict[str, Any]:
    """Of the test images' mean tokens, for the model and for one with its initial weights."""
    found: dict[str, Any] = {"spectrum_protocol": "principal directions with 90 % of the test features' variance"}
    for end, _, _, test in subject.features("pooled"):
        found[f"spectrum{end}"] = directions(np.asarray(test.values, np.float64))
    return found


register(
    Evaluation(
        "spectrum",
        "directions with 90 % of the variance",
        images=Measure(measure, needs=("training images",)),
        elsewhere="triplets have no test images",
        quick=False,  # measured where --what names it
    )
)
