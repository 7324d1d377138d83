"""Read an environment's state from a representation, so that plans are compared where distances are known.

A ridge regression, in closed form, from all tokens of a recorded frame's target representation to its recorded state.
Components are weighted by how well they are read in held-out episodes: what a picture does not show, such as a speed or
a goal, has weight 0 and does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import DataConfig
from iwm_fast.data.triplets import Triplets
from iwm_fast.errors import UserError
from iwm_fast.eval.ridge import fit_ridge
from iwm_fast.eval.world_model.frames import encode_frames
from iwm_fast.models.iwm import IWM

__all__ = ["StateHead", "fit_state_head"]

FRAMES = 2000  # at most, spread evenly over the set
_LEAST = 20
_HELD = 5  # one episode of so many is held out


@dataclass(frozen=True, eq=False)
class StateHead:
    """A linear map from representations to states, and the scale on which these are compared.

    weight: float32 (L · D, S); intercept, scale: float32 (S,); r2: float64 (S,), of each component in held-out
    episodes. scale: √max(R², 0) over the component's std, so that a distance is in stds.
    """

    weight: Tensor
    intercept: Tensor
    scale: Tensor
    r2: NDArray[np.float64]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the states (N, S), in the environment's units, of representations (N, L, D)."""
        return torch.addmm(self.intercept, tokens.float().flatten(1), self.weight)

    def distance(self, tokens: Tensor, goal: Tensor) -> Tensor:
        """Return the distance between the states of (N, L, D) and that of a goal (1, L, D), float64 (N,)."""
        far: Tensor = ((self(tokens) - self(goal)) * self.scale).double().norm(dim=1)
        return far


def fit_state_head(model: IWM, data: DataConfig, triplets: Triplets) -> StateHead:
    """Fit a head on at most 2,000 recorded frames, of which a fifth, whole episodes if there are any, is held out.

    Raises UserError where no states are recorded, or none can be read from the representation, and as `encode_frames`.
    """
    if triplets.states is None:
        raise UserError(
            f"{triplets.manifest}: no states are recorded, which a state head is fitted to: give source_state and "
            "target_state in every row (iwm-fast data record writes them), or another distance"
        )
    chosen, _, points = encode_frames(model, data, triplets, FRAMES)
    if len(chosen) < _LEAST:
        raise UserError(f"{triplets.manifest}: {len(chosen)} frames; a state head needs at least {_LEAST}")
    head = _fitted(points, triplets.states[chosen], _episodes_of_frames(triplets, chosen))
    if not (head.r2 > 0).any():
        raise UserError(
            f"{triplets.manifest}: no component of the state can be read from the representation (R² by component: "
            f"{', '.join(f'{value:.2f}' for value in head.r2)}); train longer, or use another distance"
        )
    return head


def fit_half_heads(model: IWM, data: DataConfig, triplets: Triplets) -> tuple[StateHead, StateHead] | None:
    """Fit two heads on at most 2,000 recorded frames: the first reads even episodes and is fitted on the odd ones, the
    second reads odd episodes. None where there are no states, no episodes, or too few frames.
    """
    if triplets.states is None or triplets.episode is None:
        return None
    chosen, _, points = encode_frames(model, data, triplets, FRAMES)
    episodes = _episodes_of_frames(triplets, chosen)
    assert episodes is not None
    halves = [episodes % 2 == 1, episodes % 2 == 0]
    if min(half.sum() for half in halves) < _LEAST:
        return None
    first, second = (
        _fitted(points[torch.from_numpy(half).to(points.device)], triplets.states[chosen[half]], episodes[half] // 2)
        for half in halves
    )
    return first, second


def _fitted(points: Tensor, states: NDArray[np.float64], episodes: NDArray[np.int64] | None) -> StateHead:
    """Fit states (n, S) from representations (n, L · D); every fifth episode is held out, or any fifth."""
    held = None if episodes is None else episodes % _HELD == _HELD - 1
    fit = fit_ridge(points.double().cpu().numpy(), states, held if held is not None and held.any() else None)
    spread = states.std(axis=0)
    scale = np.sqrt(fit.r2.clip(0, 1)) / np.where(spread > 0, spread, 1.0)
    weight, intercept, scale = (
        torch.from_numpy(part.astype(np.float32)).to(points.device) for part in (fit.weight, fit.intercept, scale)
    )
    return StateHead(weight, intercept, scale, fit.r2)


def _episodes_of_frames(triplets: Triplets, chosen: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the episode of each chosen frame, int64 (n,), or None where the manifest has none."""
    if triplets.episode is None:
        return None
    episode = np.zeros(len(triplets.frames), np.int64)
    episode[triplets.source], episode[triplets.target] = triplets.episode, triplets.episode
    return episode[chosen]
