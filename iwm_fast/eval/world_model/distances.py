"""Distances between representations, computed so that small ones stay accurate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DISTANCES", "TIE", "Ranking", "between", "euclidean", "points", "ties", "unit_means"]

DISTANCES = ("l2", "cosine")
# Relative to the target's norm. fp32 networks repeat themselves to about 1e-7 of it when an image moves within a batch;
# distances closer than this are equal, or a collapsed model would be ranked by rounding.
TIE = 2.0**-20

_SLICE = 2**14  # elements of each row multiplied at once in float64


@dataclass(frozen=True)
class Ranking:
    """order: int64 (B, N), indices into the bank, nearest first; distances: float64 (B, N), to each of its items."""

    order: NDArray[np.int64]
    distances: NDArray[np.float64]


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Return distances (Q, N) float64 between rows of a (Q, K) and b (N, K).

    ‖a‖² + ‖b‖² − 2ab loses all digits of a near pair in fp32 (and more in TF32). In float64, a slice of K at a time,
    the matmul takes a few per cent of the networks' time.
    """
    squared = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for a_part, b_part in zip(a.split(_SLICE, dim=1), b.split(_SLICE, dim=1), strict=True):
        x, y = a_part.double(), b_part.double()
        squared += x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
        squared.addmm_(x, y.T, alpha=-2)
    return squared.clamp_(min=0).sqrt_()


def unit_means(tokens: Tensor) -> Tensor:
    """Return unit vectors (B, D) float64 of the mean tokens; their Euclidean distance orders as the cosine does."""
    return F.normalize(tokens.double().mean(dim=1), dim=1)


def points(tokens: Tensor) -> dict[str, Tensor]:
    """Return, for tokens (B, L, D), the points of each of DISTANCES: all tokens (B, L · D), and their unit means."""
    return {"l2": tokens.flatten(1), "cosine": unit_means(tokens)}


def between(answers: dict[str, Tensor], bank: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return distances (Q, N) float64 of each kind between `points` of predictions and of a bank."""
    return {name: euclidean(answers[name], bank[name]) for name in DISTANCES}


def ties(bank: dict[str, Tensor]) -> dict[str, float]:
    """Return the difference of each kind up to which two items of the bank are equally near."""
    squares = bank["l2"].double().square().sum(dim=1)
    norm = float(squares[squares.isfinite()].mean().nan_to_num().sqrt())  # of a view that overflows, none
    return {"l2": TIE * norm, "cosine": TIE}
