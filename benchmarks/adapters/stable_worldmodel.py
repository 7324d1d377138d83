"""stable-worldmodel's CEM on our cost: its solvers take any object with ``get_cost``.

It is no dependency: install it in an environment of its own (`pip install stable-worldmodel`), beside iwm-fast. What
differs from ours: its samples are not kept within bounds, it passes all candidates at once (ours are split below it),
its refit std multiplies noise whose first iteration has std 1, and it returns the mean of its best candidates, whose
cost is not predicted. One generator serves all its plans, so a plan depends on those made before.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.benchmarks.adapters.inputs import SideMissing

__all__ = ["CostObject", "cem"]


class CostObject:
    """A cost of actions (N, H, A), as the object that their solvers call with (1, N, H, A)."""

    def __init__(self, cost: Callable[[Tensor], Tensor]) -> None:
        self._cost = cost

    def get_cost(self, info: dict[str, Any], candidates: Tensor) -> Tensor:
        """Return (1, N)."""
        del info
        return self._cost(candidates[0])[None].to(candidates)

    criterion = get_cost


def cem(
    cost: Callable[[Tensor], Tensor], *, horizon: int, components: int, candidates: int, iterations: int, seed: int = 0
) -> Callable[[], Tensor]:
    """Return a function that plans, and returns actions (H, A). Raise SideMissing where it is not installed."""
    try:
        import gymnasium
        from stable_worldmodel.solver.cem import CEMSolver
    except ImportError as error:
        raise SideMissing(f"stable-worldmodel is not installed ({error})") from error
    solver = CEMSolver(
        CostObject(cost), num_samples=candidates, n_steps=iterations, topk=max(2, candidates // 10), seed=seed
    )
    bounds = gymnasium.spaces.Box(-1.0, 1.0, (1, components), np.float32)
    solver.configure(action_space=bounds, n_envs=1, config=SimpleNamespace(horizon=horizon, action_block=1))

    def plan() -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its time
            found: Tensor = solver.solve({"frame": torch.zeros(1, 1)})["actions"][0]
        return found

    return plan
