"""Plan from a picture to a goal: encode both, search, and return the actions with what they are predicted to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.actions.space import ActionSpace
from iwm_fast.errors import UserError
from iwm_fast.eval.features import device_of
from iwm_fast.eval.world_model.planning.cost import Distance, GoalCost, Score
from iwm_fast.eval.world_model.planning.distributions import ActionKind
from iwm_fast.eval.world_model.planning.solvers import Found, Method, Search, descend, search
from iwm_fast.eval.world_model.planning.state_head import StateHead
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import encode_window

__all__ = ["Plan", "Settings", "action_kind", "make_plan", "require_planning"]

_CANDIDATES = {"cem": 1000, "mppi": 1000, "gradient": 32}
_ITERATIONS = {"cem": 5, "mppi": 5, "gradient": 40}


@dataclass(frozen=True, eq=False)
class Plan:
    """Actions towards a goal, and what they are predicted to lead to.

    actions: float32 (H, A), the predictor's input; values: the same as physical values by name. cost: predicted, of
    these actions; history: the least cost after each iteration. along: float64 (H,), the predicted distance to the
    goal after each action; distance_now: that of the newest frame's own representation. predictions: float32
    (H, L, D), the predicted representations, which compare with `targets`. tried: sequences whose cost was predicted.
    """

    actions: NDArray[np.float32]
    values: tuple[dict[str, float], ...]
    cost: float
    history: tuple[float, ...]
    along: NDArray[np.float64]
    distance_now: float
    predictions: Tensor
    tried: int


@dataclass(frozen=True, eq=False)
class Settings:
    """How to plan; `WorldModel.plan` describes each. shuffled: as in `GoalCost`."""

    horizon: int = 8
    method: Method = "cem"
    candidates: int | None = None
    iterations: int | None = None
    distance: Distance = "l2"
    score: Score = "last"
    seed: int = 0
    shuffled: bool = False

    def checked(self) -> Settings:
        """Return the settings with the method's defaults. Raise UserError for those that are out of range."""
        for name, kind in (("method", Method), ("distance", Distance), ("score", Score)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} is {getattr(self, name)!r}: give {', '.join(get_args(kind))}")
        candidates = _CANDIDATES[self.method] if self.candidates is None else self.candidates
        iterations = _ITERATIONS[self.method] if self.iterations is None else self.iterations
        least = {"horizon": 1, "candidates": 1 if self.method == "gradient" else 2, "iterations": 1, "seed": 0}
        given = {"horizon": self.horizon, "candidates": candidates, "iterations": iterations, "seed": self.seed}
        for name, value in given.items():
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not (whole and least[name] <= value < 2**63):
                raise UserError(f"{name} is {value!r:.60}: give a whole number from {least[name]} on")
        return Settings(
            int(self.horizon), self.method, int(candidates), int(iterations), self.distance, self.score,
            int(self.seed), self.shuffled,
        )  # fmt: skip


def require_planning(space: ActionSpace, horizon: int, unread: str | None) -> None:
    """Raise UserError where a run has no actions to plan, or does not read what it predicts (`Config.unread`)."""
    if not isinstance(space, ExternalSpace):
        raise UserError(
            "plan: this run has no actions to plan: it was trained on images, whose actions are changes of a picture; "
            "train on triplets, as docs/guides/triplets.md shows"
        )
    if unread is not None and horizon > 1:
        raise UserError(
            f"plan: horizon is {horizon}, and {unread}: give horizon 1, or train with model.freeze_encoder on that "
            "target (docs/guides/act.md)"
        )


def action_kind(space: ActionSpace) -> ActionKind:
    """Return the kind and bounds of a run's recorded actions, on the predictor's scale."""
    if not isinstance(space, ExternalSpace):
        raise TypeError(f"space is {type(space).__name__}; it must be an ExternalSpace")
    if space.external.kind == "discrete":
        return ActionKind(torch.zeros(space.dim), torch.ones(space.dim), choices=space.dim)
    ends = space.encode_values(np.array([space.external.low, space.external.high], np.float64))
    return ActionKind(torch.from_numpy(ends[0]), torch.from_numpy(ends[1]))


@torch.no_grad()
def make_plan(
    model: IWM,
    space: ActionSpace,
    frames: Tensor,
    goal: Tensor,
    settings: Settings,
    start: NDArray[np.float32] | None = None,
    head: StateHead | None = None,
) -> Plan:
    """Return the plan from a window of frames, uint8 (1, F, S, S, 3), to a goal picture, uint8 (1, S, S, 3).

    start: actions (n, A) to begin near; those beyond the horizon are left out. head: of the distance "state". Call
    `require_planning` first. Raises UserError for settings out of range, several windows or goals, and as
    `goal_distance`.
    """
    settings = settings.checked()
    if len(frames) != 1 or len(goal) != 1:
        raise UserError(f"frames and goal are {len(frames)} and {len(goal)} images: give one of each")
    device = device_of(model)
    source = encode_window(model, frames.to(device))
    now, wanted = model.targets(torch.cat([frames[:, -1], goal]).to(device)).float().split(1)
    assert settings.candidates is not None
    assert settings.iterations is not None
    near = None if start is None else torch.from_numpy(start[: settings.horizon])
    how = Search(settings.horizon, settings.candidates, settings.iterations, settings.seed, near)
    cost = GoalCost(
        model, source, wanted,
        distance=settings.distance, head=head, score=settings.score, shuffled=settings.shuffled,
    )  # fmt: skip
    kind = action_kind(space)
    found = (
        descend(cost.slope, kind, how) if settings.method == "gradient" else search(cost, kind, how, settings.method)
    )
    return _plan(cost, space, found, now)


def _plan(cost: GoalCost, space: ActionSpace, found: Found, now: Tensor) -> Plan:
    predictions = torch.cat(list(cost.predictions(found.actions[None].to(now.device))))  # (H, L, D)
    actions = found.actions.numpy()
    return Plan(
        actions=actions,
        values=tuple({name: float(value[0]) for name, value in space.decode(row[None]).items()} for row in actions),
        cost=found.cost,
        history=found.history,
        along=cost.far(predictions).cpu().numpy(),
        distance_now=float(cost.far(now.float())),
        predictions=predictions,
        tried=found.tried,
    )
