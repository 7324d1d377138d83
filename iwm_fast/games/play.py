"""Make an environment of gymnasium, and play it with pictures as a recording has them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.config.external import ExternalActions
from iwm_fast.errors import UserError
from iwm_fast.games.recording import Pixels, Recording

__all__ = ["Game", "Held", "environment_actions"]

_MOST_NUMBERS = 256  # of a state: larger observations are pictures
_FAINT = 3  # of 255: what remains of a thing whose edge alone is in the picture
_GREY = 124  # near ImageNet's mean of red, which normalises to about 0


@dataclass(frozen=True)
class Held:
    """What an action, held for the recording's steps, led to.

    reward: summed; last_reward: of the last step. steps: those made. shown: whether the picture shows it; it does not
    if the episode ended before the steps that a picture of motion shows were rendered, and no absorbing picture stands
    for them.
    """

    reward: float
    last_reward: float
    steps: int
    terminated: bool
    truncated: bool
    shown: bool
    info: dict[str, Any]

    @property
    def over(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class Game:
    """An environment as a recording makes, plays and draws it. Close it after use.

    background: the picture that is subtracted, of a recording that shows only what moves.
    """

    def __init__(self, recording: Recording, background: Pixels | None = None) -> None:
        """Raise UserError if gymnasium is missing, or the environment cannot be made or has other kinds of actions."""
        self.recording = recording
        self.background = background
        self.env = _make(recording)
        try:
            self.actions = environment_actions(self.env, recording.env)
        except UserError:
            self.env.close()
            raise
        self._observed: Any = None
        self._recent: list[Image.Image] = []

    def close(self) -> None:
        """Free the environment."""
        self.env.close()

    def reset(self, seed: int) -> None:
        """Begin an episode. Raises UserError where the environment refuses the recording's options."""
        options = dict(self.recording.reset)
        try:
            self._observed, _ = self.env.reset(seed=seed, **({"options": options} if options else {}))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.recording.env}: cannot be reset with {options}: {_line(error)}") from error
        self._recent = [self.draw()] * 3

    def hold(self, action: int | NDArray[Any], repeat: int | None = None) -> Held:
        """Hold an action, a choice from 0 or numbers of the environment's units, for `repeat` steps.

        Default: the recording's. Frames that no picture shows are not rendered.
        """
        recording, env = self.recording, self.env
        repeat = recording.repeat if repeat is None else repeat
        given = self._given(action)
        total, over, held = 0.0, False, 0
        for held in range(repeat):
            self._observed, reward, terminated, truncated, info = env.step(given)
            total += float(reward)
            over = terminated or truncated
            if over or held >= repeat - (3 if recording.motion else 1):
                self._recent = [*self._recent[1:], self.draw()]
            if over:
                break
        absorbed = terminated and recording.absorbing
        if absorbed:
            self._recent = [self._recent[-1]] * 3
        unseen = over and not absorbed and recording.motion and held < repeat - 1 and repeat > 3
        return Held(total, float(reward), held + 1, bool(terminated), bool(truncated), not unseen, dict(info))

    @property
    def state(self) -> NDArray[np.float64] | None:
        """The last observation as finite numbers, float64 (S,), choices one-hot; None where it is a picture, a text or
        the like.
        """
        from gymnasium import spaces

        space = self.env.observation_space
        if not space.is_np_flattenable or spaces.flatdim(space) > _MOST_NUMBERS:
            return None
        numbers = np.asarray(spaces.flatten(space, self._observed), np.float64)
        return numbers if np.isfinite(numbers).all() else None

    def picture(self) -> Pixels:
        """Return the picture of now, uint8 (size, size, 3)."""
        return self.seen(self._recent)

    def seen(self, recent: list[Image.Image]) -> Pixels:
        """Return the picture of the last three frames, the newest last."""
        if not self.recording.motion:
            return self._moving(np.asarray(recent[-1], np.uint8))
        return self._moving(np.stack([np.asarray(one.convert("L"), np.uint8) for one in recent], axis=2))

    def empty(self, picture: Pixels) -> bool:
        """Return whether a picture less the background shows nothing; False where no background is subtracted."""
        return self.background is not None and bool((np.abs(picture.astype(np.int16) - _GREY) <= _FAINT).all())

    def draw(self, drawn: Any = None) -> Image.Image:
        """Return a rendering, or what the environment renders now: the crop, resized to a square."""
        recording = self.recording
        frame = self.render() if drawn is None else drawn
        picture = Image.fromarray(np.asarray(frame, np.uint8))
        left, top, right, bottom = recording.crop
        box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
        return picture.resize((recording.size, recording.size), Image.Resampling.BOX, box)

    def render(self) -> Pixels:
        """Return the environment's own picture, uint8 (height, width, 3). Raises UserError where it has none."""
        from gymnasium.error import Error

        try:
            drawn = self.env.render()
        except Error as error:  # pygame is missing, say
            raise UserError(f"{self.recording.env}: cannot be rendered: {_line(error)}") from error
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3 or drawn.shape[2] != 3:
            raise UserError(f"{self.recording.env}: does not render RGB frames; choose another environment")
        return np.asarray(drawn, np.uint8)

    def _given(self, action: int | NDArray[Any]) -> Any:
        space = self.env.action_space
        if self.actions.kind == "discrete":
            return int(action) + int(space.start)
        numbers = np.asarray(action, np.float64).astype(space.dtype)
        return np.clip(numbers, space.low.reshape(-1), space.high.reshape(-1)).reshape(space.shape)

    def _moving(self, picture: Pixels) -> Pixels:
        """Return the frame, or its difference to the background, centred on mid-grey and clipped."""
        if self.background is None:
            return picture
        return np.asarray(np.clip(picture.astype(np.int16) - self.background + _GREY, 0, 255), np.uint8)


def _make(recording: Recording) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # or SIGTERM would be an event that nobody reads
    try:
        import gymnasium
        from gymnasium.error import Error
    except ImportError as error:
        raise UserError("games need gymnasium and pygame: pip install 'iwm-fast[games]'") from error
    try:
        return gymnasium.make(
            recording.env, render_mode="rgb_array", disable_env_checker=True, **(recording.arguments or {})
        )
    except (Error, TypeError, ValueError, ImportError, ModuleNotFoundError, AssertionError) as error:
        raise UserError(f"{recording.env}: gymnasium cannot make it: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def environment_actions(env: Any, name: str) -> ExternalActions:
    """Return the environment's action space. Raise UserError if it is neither discrete nor a bounded box."""
    from gymnasium import spaces

    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return ExternalActions(kind="discrete", names=tuple(str(choice) for choice in range(int(space.n))))
    if isinstance(space, spaces.Box) and np.isfinite([space.low, space.high]).all():
        low, high = space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float)
        neutral = np.where((low <= 0) & (high >= 0), 0.0, low + (high - low) / 2)
        return ExternalActions(
            kind="continuous",
            names=tuple(f"action_{place}" for place in range(len(low))),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            neutral=tuple(neutral.tolist()),
        )
    raise UserError(f"{name}: its actions are {space}; a Discrete space or a Box with finite bounds is needed")
