"""One episode in a receding horizon: plan, hold the first actions of the plan, look again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.data.tools.record_gym import episode_seed, sampled_action
from iwm_fast.eval.acting.frames import Resizer
from iwm_fast.eval.features import device_of
from iwm_fast.eval.world_model.planning.cost import goal_distance
from iwm_fast.eval.world_model.planning.plan import Plan, Settings, make_plan
from iwm_fast.eval.world_model.planning.state_head import StateHead
from iwm_fast.games.goals import succeeded
from iwm_fast.games.play import Game, Held
from iwm_fast.games.recording import Pixels
from iwm_fast.models.iwm import IWM

__all__ = ["POLICIES", "Decision", "Episode", "Planner", "Policy", "PolicyName", "RandomPlayer", "play_episode"]

PolicyName = Literal["plan", "greedy", "shuffled", "random"]
POLICIES: tuple[PolicyName, ...] = ("plan", "greedy", "shuffled", "random")
_LIMIT = 1000  # decisions, of an environment that ends no episode


@dataclass(frozen=True, eq=False)
class Decision:
    """An action that was held: the picture before it, the action as recorded ones are, and the plan that it is of.

    step: of the plan, from 0. distance: of the picture's representation to the goal; None of a random player.
    """

    picture: Pixels
    action: int | NDArray[Any]
    plan: Plan | None
    step: int
    distance: float | None


@dataclass(frozen=True, eq=False)
class Episode:
    """What happened. steps: of the environment; reward: their sum; last: the last picture."""

    number: int
    seed: int
    success: bool
    steps: int
    reward: float
    goal: Pixels
    last: Pixels
    decisions: list[Decision] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as JSON: costs are those predicted of each plan, distances those of each picture."""
        plans = [(d.plan, number) for number, d in enumerate(self.decisions) if d.plan is not None and d.step == 0]
        return {
            "episode": self.number,
            "seed": self.seed,
            "success": self.success,
            "steps": self.steps,
            "decisions": len(self.decisions),
            "return": self.reward,
            "actions": [np.asarray(decision.action).tolist() for decision in self.decisions],
            "distances": [decision.distance for decision in self.decisions],
            "planned_at": [number for _, number in plans],
            "costs": [plan.cost for plan, _ in plans],
        }


class Policy(Protocol):
    """Chooses actions."""

    def begin(self, episode: int, goal: Pixels) -> None:
        """Begin an episode with a goal."""
        ...

    def decide(self, game: Game, number: int) -> Decision:
        """Choose the episode's action `number`, from 0, from the game's picture."""
        ...


class RandomPlayer:
    """The player that recorded the data, with other seeds: its persistence included."""

    def __init__(self) -> None:
        self._episode = 0
        self._last: int | NDArray[Any] | None = None

    def begin(self, episode: int, goal: Pixels) -> None:
        """Forget the last action."""
        del goal
        self._episode, self._last = episode, None

    def decide(self, game: Game, number: int) -> Decision:
        """Sample an action."""
        action = sampled_action(game, self._episode, number + 1, self._last)
        self._last = action
        return Decision(game.picture(), action, None, 0, None)


class Planner:
    """Plans to the goal every `every` decisions, near what is left of the plan before. head: of the distance state."""

    def __init__(
        self,
        model: IWM,
        space: ExternalSpace,
        settings: Settings,
        resize: Resizer,
        every: int,
        head: StateHead | None = None,
    ) -> None:
        self._model, self._space, self._settings = model, space, settings
        self._resize, self._every, self._head = resize, every, head
        self._plan: Plan | None = None
        self._window: Tensor | None = None

    @torch.no_grad()
    def begin(self, episode: int, goal: Pixels) -> None:
        """Encode the goal, and forget the frames before."""
        self._episode, self._plan, self._step = episode, None, 0
        self._picture, self._window = self._resize(goal), None
        self._goal = self._model.targets(self._picture.to(device_of(self._model))).float()

    @torch.no_grad()
    def decide(self, game: Game, number: int) -> Decision:
        """Return the plan's next action, of a new plan where the last has been followed long enough."""
        picture = game.picture()
        seen = self._resize(picture)
        # At an episode's beginning the first frame stands for all of the window, as in training.
        before = seen.repeat(self._model.config.history, 1, 1, 1) if self._window is None else self._window
        self._window = torch.cat([before[1:], seen])
        now = self._model.targets(seen.to(device_of(self._model))).float()
        plan = self._plan
        if plan is None or self._step >= min(self._every, len(plan.actions)):
            left = None if plan is None else plan.actions[self._step :]
            # A seed of its own for each decision, so that errors of the search are not repeated.
            settings = replace(self._settings, seed=episode_seed(self._settings.seed, self._episode) + number)
            plan = make_plan(self._model, self._space, self._window[None], self._picture, settings, left, self._head)
            self._plan, self._step = plan, 0
        step, self._step = self._step, self._step + 1
        distance = float(goal_distance(now, self._goal, self._settings.distance, self._head))
        return Decision(picture, self._told(plan.actions[step]), plan, step, distance)

    def _told(self, action: NDArray[np.float32]) -> int | NDArray[Any]:
        """Return a vector as the environment takes it."""
        if self._space.external.kind == "discrete":
            return int(action.argmax())
        values = self._space.decode(action[None])
        return np.array([float(values[name][0]) for name in self._space.names])


def play_episode(
    game: Game,
    policy: Policy,
    goal: Callable[[Game], Pixels],
    *,
    number: int,
    seed: int,
    repeat: int,
    most: int | None = None,
) -> Episode:
    """Play one episode, of at most `most` decisions, and return it."""
    game.reset(seed)
    wanted = goal(game)
    policy.begin(number, wanted)
    decisions: list[Decision] = []
    held, steps, reward = None, 0, 0.0
    while (held is None or not held.over) and len(decisions) < (most or _LIMIT):
        decisions.append(policy.decide(game, len(decisions)))
        held = game.hold(decisions[-1].action, repeat)
        steps, reward = steps + held.steps, reward + held.reward
    assert isinstance(held, Held)
    success = succeeded(game, terminated=held.terminated, last_reward=held.last_reward, info=held.info)
    return Episode(number, seed, success, steps, reward, wanted, game.picture(), decisions)
