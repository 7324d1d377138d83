"""Search for the sequence of actions of least cost: CEM, MPPI, and gradient descent. A cost is any function.

CEM (Rubinstein 1999): sample candidates, refit the distribution to the best tenth, repeat. MPPI (Williams et al. 2017):
refit to all, with weights exp(−(cost − least) / (0.1 · std of the costs)). Gradient: Adam on many sequences at once,
clipped to the bounds after each step.

Where there are no more sequences of choices than candidates, every one is tried once. Each search returns the best
sequence of all that it tried. Random numbers come from the seed alone, on the CPU, so a search depends on nothing else
but the values of the cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.planning.distributions import ActionKind, Distribution, Gaussian

__all__ = ["Cost", "Found", "Method", "Search", "Slope", "descend", "search"]

Cost = Callable[[Tensor], Tensor]  # actions float32 (N, H, A), to costs float64 (N,), on the CPU both
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]  # actions, to costs (N,) and their gradients (N, H, A)
Method = Literal["cem", "mppi", "gradient"]

_ELITES = 0.1  # share of candidates that CEM refits to
_TEMPERATURE = 0.1  # of MPPI, in stds of the costs
_RATE = 0.1  # Adam's, in half widths of the bounds
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Search:
    """How to search: H actions, N candidates per iteration, iterations, the seed, and actions (n ≤ H, A) to begin
    near.
    """

    horizon: int
    candidates: int
    iterations: int
    seed: int = 0
    start: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """The best sequence, float32 (H, A), its cost, and the least cost after each iteration."""

    actions: Tensor
    cost: float
    history: tuple[float, ...]
    tried: int


class _Best:
    """The best sequence so far."""

    def __init__(self) -> None:
        self.actions: Tensor | None = None
        self.cost = float("inf")
        self.history: list[float] = []
        self.tried = 0

    def see(self, actions: Tensor, costs: Tensor) -> Tensor:
        """Take part in an iteration; return the costs, infinite where they are no numbers."""
        costs = torch.where(costs.isfinite(), costs, torch.inf)
        first = int(costs.argmin())
        if float(costs[first]) < self.cost:
            self.actions, self.cost = actions[first].clone(), float(costs[first])
        self.tried += len(actions)
        self.history.append(self.cost)
        return costs

    def found(self) -> Found:
        if self.actions is None:
            raise UserError("plan: no predicted cost is a finite number; the run has diverged, or was not trained")
        return Found(self.actions, self.cost, tuple(self.history), self.tried)


def search(cost: Cost, kind: ActionKind, how: Search, method: Literal["cem", "mppi"] = "cem") -> Found:
    """Return the best of ``how.candidates`` sampled sequences per iteration."""
    best = _Best()
    every = kind.sequences(how.horizon, how.candidates)
    if every is not None:
        best.see(every, cost(every))
        return best.found()
    generator = torch.Generator().manual_seed(how.seed)
    distribution: Distribution = kind.distribution(how.horizon, how.start)
    for _ in range(how.iterations):
        actions = distribution.sample(how.candidates, generator)
        costs = best.see(actions, cost(actions))
        if bool(costs.isfinite().any()):  # else all is as it was, and others are sampled
            distribution = distribution.refit(actions, _elites(costs) if method == "cem" else _soft(costs))
    return best.found()


def _elites(costs: Tensor) -> Tensor:
    """Return equal weights of the best, 0 of the others."""
    count = max(2, round(_ELITES * len(costs)))
    chosen = costs.argsort(stable=True)[:count]
    weights = torch.zeros(len(costs), dtype=torch.float64)
    weights[chosen[costs[chosen].isfinite()]] = 1
    return weights / weights.sum()


def _soft(costs: Tensor) -> Tensor:
    """Return weights that fall exponentially with the cost."""
    finite = costs[costs.isfinite()]
    spread = float(finite.std(correction=0)) or 1.0
    weights = (-(costs - finite.min()) / (_TEMPERATURE * spread)).exp()
    return weights / weights.sum()


def descend(slope: Slope, kind: ActionKind, how: Search) -> Found:
    """Return the best of all sequences on the way of Adam from ``how.candidates`` starts, the first its centre.

    Raise UserError for choices, which have no gradient.
    """
    if kind.choices is not None:
        raise UserError("plan: method gradient needs continuous actions, and the run's are choices; use cem or mppi")
    generator = torch.Generator().manual_seed(how.seed)
    middle, half = (kind.high + kind.low) / 2, (kind.high - kind.low) / 2
    place = Gaussian.within(kind.low, kind.high, how.horizon, how.start).sample(how.candidates, generator)
    first, second = torch.zeros_like(place), torch.zeros_like(place)
    best = _Best()
    for step in range(1, how.iterations + 1):
        costs, gradient = slope(place)
        best.see(place, costs)
        wanted = torch.where(gradient.isfinite(), gradient, 0.0) * half  # by half widths
        first = _BETAS[0] * first + (1 - _BETAS[0]) * wanted
        second = _BETAS[1] * second + (1 - _BETAS[1]) * wanted.square()
        move = (first / (1 - _BETAS[0] ** step)) / ((second / (1 - _BETAS[1] ** step)).sqrt() + _EPS)
        place = (place - _RATE * move * half).clamp(middle - half, middle + half)
    return best.found()
