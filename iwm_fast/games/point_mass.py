"""A point mass in a square room with walls, to be moved to a goal: NumPy only, seeded.

The room is the unit square, x to the right and y down, as in its picture. Friction is so strong that the velocity is
the action: a step moves the point by `speed` times the action. At a wall it slides. The goal is not drawn, so that a
picture shows the point's position and nothing else; `goal_picture` is the room with the point on the goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

__all__ = ["PointMassWalls"]

Point = NDArray[np.float64]

RADIUS = 0.06  # of the point, as shares of the room
_WALL = ((0.47, 0.0, 0.53, 0.6),)  # left, top, right, bottom: the way round it is below
_MOVES = 8  # per step, so that no wall is jumped: each is at most speed / 8
_FLOOR, _STONE, _POINT = (124, 116, 104), (40, 40, 40), (235, 60, 40)


class PointMassWalls(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Move a point to a goal. Action: velocity, two numbers in [-1, 1]. Observation: position and goal, four in [0, 1].

    An episode ends with reward 1 and info["is_success"] within `reach` of the goal; otherwise rewards are 0. Start and
    goal are sampled uniformly, at least `apart` from each other. Distances are shares of the room's side.

    walls: rectangles (left, top, right, bottom). size: side of the picture, pixels.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (gymnasium's way)

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        walls: Sequence[Sequence[float]] = _WALL,
        speed: float = 0.1,
        reach: float = 0.06,
        apart: float = 0.4,
        size: int = 64,
    ) -> None:
        """Raise ValueError for a wall that is no rectangle, or a room without a free place."""
        self.walls = np.asarray(walls, np.float64).reshape(-1, 4)
        if not ((self.walls[:, :2] < self.walls[:, 2:]).all() and np.isfinite(self.walls).all()):
            raise ValueError(f"walls are {self.walls.tolist()}; each must be left, top, right, bottom, ascending")
        if not (0 < speed <= 1 and 0 < reach < 1 and 0 <= apart < 1 and size >= 8):
            raise ValueError(
                f"speed, reach, apart and size are {speed}, {reach}, {apart}, {size}; they must be within (0, 1], "
                "(0, 1), [0, 1) and from 8 on"
            )
        self.render_mode, self.speed, self.reach, self.apart, self.size = render_mode, speed, reach, apart, size
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Box(0.0, 1.0, (4,), np.float32)
        self.position = self.goal = np.full(2, 0.5)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Sample start and goal. options: "position" and "goal", two numbers each, in place of sampled ones."""
        super().reset(seed=seed)
        given = options or {}
        self.position, self.goal = self._sampled(), self._sampled()
        for _ in range(1000):
            if np.linalg.norm(self.position - self.goal) >= self.apart:
                break
            self.position, self.goal = self._sampled(), self._sampled()
        for name in ("position", "goal"):
            if name in given:
                setattr(self, name, self._checked(name, given[name]))
        return self._seen(), {"is_success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the point."""
        move = np.clip(np.asarray(action, np.float64), -1.0, 1.0) * self.speed / _MOVES
        for _ in range(_MOVES):
            for axis in (0, 1):
                moved = self.position.copy()
                moved[axis] += move[axis]
                if self._free(moved):
                    self.position = moved
        done = bool(np.linalg.norm(self.position - self.goal) <= self.reach)
        return self._seen(), float(done), done, False, {"is_success": done}

    def render(self) -> NDArray[np.uint8]:
        """Return the room as uint8 (size, size, 3)."""
        return self._drawn(self.position)

    def goal_picture(self) -> NDArray[np.uint8]:
        """Return the room with the point on the goal of this episode."""
        return self._drawn(self.goal)

    def _sampled(self) -> Point:
        for _ in range(1000):
            place = self.np_random.uniform(RADIUS, 1 - RADIUS, 2)
            if self._free(place):
                return place
        raise ValueError(f"walls are {self.walls.tolist()}; no free place was found")

    def _checked(self, name: str, given: Any) -> Point:
        place = np.asarray(given, np.float64)
        if place.shape != (2,) or not self._free(place):
            raise ValueError(f"{name} is {given}; it must be a free place of the room, x and y")
        return place

    def _free(self, place: Point) -> bool:
        """Return whether the point, a square of 2 RADIUS to walls, fits there."""
        inside = bool((place >= RADIUS).all() and (place <= 1 - RADIUS).all())
        near = (place + RADIUS > self.walls[:, :2]) & (place - RADIUS < self.walls[:, 2:])
        return inside and not near.all(axis=1).any()

    def _seen(self) -> NDArray[np.float32]:
        return np.concatenate([self.position, self.goal]).astype(np.float32)

    def _drawn(self, place: Point) -> NDArray[np.uint8]:
        """Draw with edges smoothed over a pixel, so that a picture tells positions between pixels apart."""
        middle = (np.arange(self.size) + 0.5) / self.size
        x, y = middle[None, :], middle[:, None]
        picture = np.broadcast_to(np.array(_FLOOR, np.float64), (self.size, self.size, 3)).copy()
        for left, top, right, bottom in self.walls:
            picture[(x >= left) & (x < right) & (y >= top) & (y < bottom)] = _STONE
        away = np.hypot(x - place[0], y - place[1])
        cover = np.clip((RADIUS - away) * self.size + 0.5, 0.0, 1.0)[:, :, None]
        return np.asarray(np.rint(picture + cover * (np.array(_POINT) - picture)), np.uint8)
