"""The picture of a game's goal: the environment's own, or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from iwm_fast.errors import UserError
from iwm_fast.games.play import Game
from iwm_fast.games.recording import Pixels

__all__ = ["auto_goal", "picture_goal", "succeeded"]


def auto_goal(game: Game) -> Pixels:
    """Return the picture of the present episode's goal, as recorded pictures are; the episode is not changed.

    An environment's own `goal_picture()`; of FrozenLake the walker on G; of MountainCar the car at the flag, at rest.
    Raises UserError for others.
    """
    base = game.env.unwrapped
    if callable(getattr(base, "goal_picture", None)):
        frame = np.asarray(base.goal_picture(), np.uint8)
    elif type(base).__name__ in _AT_GOAL:
        attribute, goal = _AT_GOAL[type(base).__name__]
        before = getattr(base, attribute)
        setattr(base, attribute, goal(base))
        try:
            frame = game.render()
        finally:
            setattr(base, attribute, before)
    else:
        raise UserError(
            f"{game.recording.env}: gives no picture of its goal: give --goal PICTURE, or let its environment have "
            "goal_picture(), which returns uint8 (height, width, 3)"
        )
    return game.seen([game.draw(frame)] * 3)


def _lake(base: Any) -> int:
    row, column = np.argwhere(np.asarray(base.desc) == b"G")[0]
    return int(row) * int(base.ncol) + int(column)


def _car(base: Any) -> Any:
    return np.array([base.goal_position, base.goal_velocity])


# An environment's class: the attribute that holds its state, and a function that returns the goal's.
_AT_GOAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "FrozenLakeEnv": ("s", _lake),
    "MountainCarEnv": ("state", _car),
    "Continuous_MountainCarEnv": ("state", _car),
}


def picture_goal(game: Game, path: Path) -> Pixels:
    """Return a file's picture as recorded pictures are: a recorded frame as it is, a rendering of the environment's own
    size cropped and resized like those. Raises UserError for another size, and where it cannot be read.
    """
    size = game.recording.size
    try:
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB"), np.uint8)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read as a picture"
        raise UserError(f"--goal {path}: {why}; give a picture, or auto") from error
    if picture.shape == (size, size, 3):
        return picture
    rendered = game.render().shape
    if picture.shape == rendered:
        return game.seen([game.draw(picture)] * 3)
    raise UserError(
        f"--goal {path}: {picture.shape[1]} × {picture.shape[0]} pixels: give a recorded frame, {size} × {size}, or a "
        f"rendering of {game.recording.env}, {rendered[1]} × {rendered[0]}"
    )


def succeeded(game: Game, *, terminated: bool, last_reward: float, info: dict[str, Any]) -> bool:
    """Return whether an episode that is over reached its goal.

    info["is_success"] where the environment gives it; of MountainCar, whether the environment ended it; else whether it
    did so with a positive reward.
    """
    if "is_success" in info:
        return bool(info["is_success"])
    reached = type(game.env.unwrapped).__name__ in ("MountainCarEnv", "Continuous_MountainCarEnv")
    return terminated and (reached or last_reward > 0)
