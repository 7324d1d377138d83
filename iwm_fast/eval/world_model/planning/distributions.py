"""Distributions over sequences of actions: what a search samples from, and refits to the better samples.

Legend: N candidates, H actions each, A components of an action. Continuous: independent normal distributions, whose
samples are clipped to the bounds, so that a bound has the weight of all beyond it. Discrete: an independent categorical
distribution per step, whose samples are one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ActionKind", "Categorical", "Distribution", "Gaussian"]

_NARROWEST = 0.02  # share of the bounds' half width that a std never falls below, so that a search keeps searching
_UNLIKELIEST = 0.05  # share of a categorical distribution that stays uniform, for the same reason


@dataclass(frozen=True, eq=False)
class ActionKind:
    """What actions are: one of ``choices`` (one-hot), or where that is None numbers from low to high, float32 (A,)."""

    low: Tensor
    high: Tensor
    choices: int | None = None

    def distribution(self, horizon: int, start: Tensor | None) -> Distribution:
        """Return what a search begins with; ``start`` (n ≤ H, A) is what its first n actions may be near."""
        if self.choices is not None:
            return Categorical.over(self.choices, horizon, start)
        return Gaussian.within(self.low, self.high, horizon, start)

    def sequences(self, horizon: int, most: int) -> Tensor | None:
        """Return every sequence of choices, float32 (N, H, A), if there are at most ``most``; else None."""
        if self.choices is None or horizon * torch.tensor(float(self.choices)).log() > torch.tensor(most + 0.5).log():
            return None
        places = torch.cartesian_prod(*[torch.arange(self.choices)] * horizon).view(-1, horizon)
        return torch.eye(self.choices)[places]


class Distribution(Protocol):
    """A distribution over sequences (H, A)."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return float32 (count, H, A) on the CPU; the first is the distribution's centre."""
        ...

    def refit(self, actions: Tensor, weights: Tensor) -> Distribution:
        """Return the distribution of weighted samples: (N, H, A), and float64 (N,) that sum to 1."""
        ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean, std: float64 (H, A); low, high: float64 (A,)."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def within(cls, low: Tensor, high: Tensor, horizon: int, start: Tensor | None) -> Gaussian:
        """Return a std of half the width, around `start` and after it the middle of the bounds."""
        low, high = low.double(), high.double()
        mean = ((low + high) / 2).repeat(horizon, 1)
        if start is not None:
            mean[: len(start)] = start.double().clamp(low, high)
        return cls(mean, ((high - low) / 2).repeat(horizon, 1), low, high)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return clipped samples."""
        noise = torch.randn(count, *self.mean.shape, generator=generator, dtype=torch.float64)
        noise[0] = 0
        return (self.mean + self.std * noise).clamp(self.low, self.high).float()

    def refit(self, actions: Tensor, weights: Tensor) -> Gaussian:
        """Return their weighted mean and std."""
        given, share = actions.double(), weights[:, None, None]
        mean = (share * given).sum(dim=0)
        std = (share * (given - mean).square()).sum(dim=0).sqrt()
        return Gaussian(mean, torch.maximum(std, _NARROWEST * (self.high - self.low) / 2), self.low, self.high)


@dataclass(frozen=True, eq=False)
class Categorical:
    """chances: float64 (H, A), each row sums to 1."""

    chances: Tensor

    @classmethod
    def over(cls, choices: int, horizon: int, start: Tensor | None) -> Categorical:
        """Return equal chances; half of those of the first actions are `start`'s choices."""
        chances = torch.full((horizon, choices), 1 / choices, dtype=torch.float64)
        if start is not None:
            chances[: len(start)] = (chances[: len(start)] + start.double()) / 2
        return cls(chances)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return one-hot samples."""
        ends = self.chances.cumsum(dim=1)
        drawn = torch.rand(count, len(ends), 1, generator=generator, dtype=torch.float64)
        places = (drawn >= ends).sum(dim=2).clamp(max=ends.shape[1] - 1)
        places[0] = self.chances.argmax(dim=1)
        return torch.eye(ends.shape[1])[places]

    def refit(self, actions: Tensor, weights: Tensor) -> Categorical:
        """Return their weighted frequencies."""
        found = (weights[:, None, None] * actions.double()).sum(dim=0)
        return Categorical((1 - _UNLIKELIEST) * found + _UNLIKELIEST / found.shape[1])
