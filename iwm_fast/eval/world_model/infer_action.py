"""Infer the action between two representations, by a search through the predictor.

Legend: A components of an action, d of them searched, K starts refined at once, R elements of a flattened prediction.
A Sobol sequence covers the box of allowed actions. The nearest predictions are refined by damped Gauss-Newton steps
(Levenberg 1944, Marquardt 1963) with finite differences: d is small, so a step takes 2d + 1 predictions per start for
any network, and if an action explains the target exactly, the search converges to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.ranges import jitter_range, varying
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER, Jitter, component
from iwm_fast.config import ActionsConfig

__all__ = ["Answer", "Bounds", "Found", "Inferred", "jitter_bounds", "search_action"]

Answer = Callable[[Tensor], Tensor]  # actions (n, A) float32 -> answers (n, ...) of the predictor
Bounds = tuple[NDArray[np.float32], NDArray[np.float32]]  # lowest and highest action (A,)

# Share of a component's width. Central differences err by its square, 1e-4, and fp32's rounding of predictions by 1e-7
# over it; both only slow the last steps, because a step is accepted by the distance that it reaches.
_REACH = 1e-2
_STILL = 1e-6  # share of a component's width: shorter steps end the search


@dataclass(frozen=True)
class Found:
    """The action (A,) float32 with the nearest prediction, and the L2 distance over all its elements."""

    action: NDArray[np.float32]
    distance: float


@dataclass(frozen=True)
class Inferred:
    """The action that best explains a target: a vector (A,) float32, and physical values by name.

    distance: L2 over all tokens from the prediction under that action to the target; distance_neutral: the same under
    the neutral action. at_bound: components where the search stopped at a bound, so that the true action may lie beyond
    it; natural bounds (a flag's 0 and 1, a sigma of 0) do not count.
    """

    action: NDArray[np.float32]
    values: dict[str, float]
    distance: float
    distance_neutral: float
    at_bound: tuple[str, ...] = ()


def jitter_bounds(actions: ActionsConfig, space: ActionSpace) -> Bounds:
    """Return the box of actions between any two views that the configured jitter can sample; all else neutral.

    Differences reach twice as far as one view's own strength, absolute values as far.
    """
    low, high = np.zeros(space.dim, np.float32), np.zeros(space.dim, np.float32)
    ends = [_extreme(actions, end) for end in (0, 1)]
    names = varying(actions)
    for a in ends:
        for b in ends:
            corner = space.jitter_action(a, b)[0]
            for name in (name for name in names if name in space.slices):
                own = space.slices[name]
                low[own], high[own] = np.minimum(low[own], corner[own]), np.maximum(high[own], corner[own])
    return low, high


def _extreme(actions: ActionsConfig, end: int) -> Jitter:
    """Return the weakest (end 0) or strongest (1) jitter of all components at once."""
    values = {}
    for name in JITTER:
        value = jitter_range(actions, name)[end]
        if component(name).unit == "degrees":
            # Just under a quarter turn each way: a difference of half a turn or more would wrap.
            value = max(-89.9, min(89.9, value))
        values[name] = np.array([value], np.float32)
    return Jitter(**values)


def search_action(
    answer: Answer, target: Tensor, bounds: Bounds, *, candidates: int = 256, starts: int = 4, steps: int = 20
) -> Found:
    """Return the action within ``bounds`` whose prediction is nearest to ``target`` (...), by L2; neutral included.

    ``answer`` splits long batches itself. Components with equal bounds keep that value. The search is deterministic.
    Raise ValueError if a lower bound is above its upper one.
    """
    low, high = (torch.from_numpy(np.asarray(end, np.float32)).to(target.device) for end in bounds)
    if bool((low > high).any()):
        raise ValueError(f"bounds are {low.tolist()} and {high.tolist()}; each lower must not be above its upper one")
    searched = torch.nonzero(high > low)[:, 0]
    tried = _cover(low, high, searched, candidates)
    distances = (answer(tried).flatten(1).float() - target.flatten().float()).double().norm(dim=1)
    nearest = distances.argsort(stable=True)[:starts]
    best, reached = tried[nearest], distances[nearest]
    if len(searched):
        best, reached = _refine(answer, target, best, (low, high), searched, steps)
    first = int(reached.argmin())
    return Found(best[first].cpu().numpy(), float(reached[first]))


def _cover(low: Tensor, high: Tensor, searched: Tensor, count: int) -> Tensor:
    """Return actions (count + 1, A): the neutral one clipped to the bounds, then a Sobol sequence over the box."""
    actions = torch.zeros_like(low).clamp(low, high).repeat(count + 1, 1)
    if len(searched):
        drawn = torch.quasirandom.SobolEngine(len(searched), scramble=True, seed=0).draw(count).to(low)
        actions[1:, searched] = low[searched] + (high - low)[searched] * drawn
    return actions


def _refine(
    answer: Answer, target: Tensor, start: Tensor, bounds: tuple[Tensor, Tensor], searched: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Run damped Gauss-Newton from each of ``start`` (K, A); return the actions and their distances (K,) float64."""
    low, high = bounds
    width = (high - low)[searched].double()
    wanted = target.flatten().double()

    def residual(actions: Tensor) -> Tensor:
        return answer(actions).flatten(1).double() - wanted

    place, rest = start.clone(), residual(start)  # (K, A), (K, R)
    damping = torch.full((len(start), 1, 1), 1e-2, dtype=torch.float64, device=start.device)
    for _ in range(steps):
        slope = _slope(residual, place, bounds, searched) * width[None, :, None]  # (K, d, R), a unit is a whole width
        curvature = slope @ slope.transpose(1, 2)  # (K, d, d)
        scale = torch.diag_embed(curvature.diagonal(dim1=1, dim2=2))
        # A floor keeps the system solvable if a component changes nothing.
        floor = (1e-12 * curvature.abs().amax(dim=(1, 2), keepdim=True) + 1e-30) * torch.eye(len(width)).to(curvature)
        move = -torch.linalg.solve(curvature + damping * scale + floor, (slope @ rest[:, :, None]))[:, :, 0]
        trial = place.clone()
        trial[:, searched] += (move * width).to(trial)
        trial = trial.clamp(low, high)
        trial_rest = residual(trial)
        better = trial_rest.norm(dim=1) < rest.norm(dim=1)
        moved = ((trial - place)[:, searched].double() / width).abs().amax(dim=1)
        place = torch.where(better[:, None], trial, place)
        rest = torch.where(better[:, None], trial_rest, rest)
        damping = torch.where(better[:, None, None], damping / 10, damping * 10).clamp(1e-9, 1e9)
        if bool((moved < _STILL).all()):
            break
    return place, rest.norm(dim=1)


def _slope(
    residual: Callable[[Tensor], Tensor], place: Tensor, bounds: tuple[Tensor, Tensor], searched: Tensor
) -> Tensor:
    """Return derivatives (K, d, R) float64 of the predictions, by differences within the bounds."""
    low, high = bounds
    count, components = len(place), len(searched)
    reach = torch.zeros(components, len(low)).to(place)
    reach[torch.arange(components), searched] = _REACH * (high - low)[searched]
    ahead = torch.minimum(place[:, None] + reach, high)  # (K, d, A)
    behind = torch.maximum(place[:, None] - reach, low)
    both = residual(torch.cat([ahead.flatten(0, 1), behind.flatten(0, 1)]))
    plus, minus = both.view(2, count, components, -1)
    apart = (ahead - behind).sum(dim=2, dtype=torch.float64)  # (K, d): one component differs
    slope: Tensor = (plus - minus) / apart[:, :, None]
    return slope
