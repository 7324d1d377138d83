"""The cost of actions: how far from a goal the predictor ends, of many candidates in packed batches.

Legend: N candidates, H actions each, A components of an action, L tokens of D channels. The frames are encoded once;
each candidate's first window is that representation, and each prediction is the newest frame of its next. They pass the
predictor in blocks: a block runs all its steps before the next begins, so memory holds one block, whatever N.

A block's size depends on the model and N alone, never on a caller's chunk: matmuls of other sizes round otherwise, and
a search would follow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.planning.state_head import StateHead
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import predictions

__all__ = ["Distance", "GoalCost", "Score", "goal_distance"]

Distance = Literal["l2", "cosine", "state"]
Score = Literal["last", "mean", "nearest", "arrival"]

# Activations of a forward pass. On a CPU they stay in the cache: larger blocks were no faster. A GPU needs large ones.
_ROOM = {"cpu": 16 * 2**20, "cuda": 2**30}
_FLOATS = 16  # per token and channel: residual, normalised, q, k, v, mixed, four of the MLP twice
_SAVED = 24  # the same per block of layers, of a pass that is differentiated

# Of score arrival: enough that of plans that end equally near the soonest is chosen, too little to forgo a way round.
_SOON = 0.1


def goal_distance(tokens: Tensor, goal: Tensor, distance: Distance = "l2", head: StateHead | None = None) -> Tensor:
    """Return the distance of representations (N, L, D) to that of a goal (1, L, D), float64 (N,): L2 over all tokens,
    the chord between the unit mean tokens, or, with ``head``, between the states that it reads.
    """
    if distance == "state":
        if head is None:
            raise UserError("distance is state: give head, which WorldModel.state_head returns")
        return head.distance(tokens, goal)
    x, y = tokens.float(), goal.float()
    if distance == "cosine":
        x, y = F.normalize(x.mean(dim=1), dim=1), F.normalize(y.mean(dim=1), dim=1)
    far: Tensor = (x - y).flatten(1).double().norm(dim=1)
    return far


class GoalCost:
    """Costs of sequences of actions from one source, by their predictions' distance to a goal.

    source: the window of F frames from `encode_window`, (1, F · L, De). goal: `targets` of a picture, (1, L, D).
    distance, head: as in `goal_distance`. score: which predictions count, the "last", their "mean", the "nearest" of
    them, or "arrival": the last plus a tenth of the mean. shuffled: give each candidate another one's actions, a
    control.
    """

    def __init__(
        self,
        model: IWM,
        source: Tensor,
        goal: Tensor,
        *,
        distance: Distance = "l2",
        head: StateHead | None = None,
        score: Score = "last",
        shuffled: bool = False,
    ) -> None:
        self.model, self.source, self.score, self.shuffled = model, source, score, shuffled
        self.goal, self.distance, self.head = goal.float(), distance, head

    @torch.no_grad()
    def __call__(self, actions: Tensor) -> Tensor:
        """Return costs float64 (N,) on the CPU of actions (N, H, A)."""
        return self.scored(self.along(actions))

    @torch.no_grad()
    def along(self, actions: Tensor) -> Tensor:
        """Return the distance after each action, float64 (N, H) on the CPU."""
        told = actions.roll(1, dims=0) if self.shuffled else actions
        blocks = told.to(self.source.device).split(self._block(len(actions), 1))
        return torch.cat([torch.stack([self.far(p) for p in self.predictions(b)], dim=1) for b in blocks]).cpu()

    def slope(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return costs float64 (N,) and their gradients float32 (N, H, A), on the CPU."""
        costs, slopes = [], []
        for block in actions.to(self.source.device).split(self._block(len(actions), actions.shape[1], saved=True)):
            with torch.enable_grad():
                told = block.detach().clone().requires_grad_(True)
                found = self.scored(torch.stack([self.far(p) for p in self.predictions(told)], dim=1))
                (gradient,) = torch.autograd.grad(found.sum(), told)
            costs.append(found.detach().cpu())
            slopes.append(gradient.cpu())
        return torch.cat(costs), torch.cat(slopes)

    def predictions(self, actions: Tensor) -> Iterator[Tensor]:
        """Yield the predicted representation (N, L, D) float32 after each action of (N, H, A), in one batch."""
        for prediction in predictions(self.model, self.source.expand(len(actions), -1, -1), actions):
            yield prediction.float()

    def far(self, representation: Tensor) -> Tensor:
        """Return the distance of representations (N, L, D) to the goal, float64 (N,)."""
        return goal_distance(representation, self.goal, self.distance, self.head)

    def scored(self, along: Tensor) -> Tensor:
        """Return the cost (N,) of distances (N, H)."""
        if self.score == "last":
            return along[:, -1]
        if self.score == "arrival":
            return along[:, -1] + _SOON * along.mean(dim=1)
        return along.mean(dim=1) if self.score == "mean" else along.amin(dim=1)

    def _block(self, candidates: int, steps: int, *, saved: bool = False) -> int:
        """Return how many candidates go through the predictor at once: equal blocks within `_ROOM`."""
        config = self.model.config.predictor
        tokens = self.source.shape[1] + self.goal.shape[1]  # the window's, and those to predict
        floats = _SAVED * (config.depth + 1) * steps if saved else _FLOATS
        most = max(1, _ROOM[self.source.device.type] // (4 * tokens * config.width * floats))
        return -(-candidates // -(-candidates // most))
