"""Record triplets from a gymnasium environment: a rendered frame, the action of a random player, the next frame.

The player samples each action uniformly and repeats it for `repeat` steps of the environment, so that its effect is
visible. Actions are a function of (seed, episode, decision), each episode resets the environment with its own seed, and
the test episodes are numbered after the training episodes: the same command gives the same files. No display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.atomic_files import whole_folder
from iwm_fast.config.schema import ExternalActions
from iwm_fast.data.randomness import uniforms
from iwm_fast.data.triplet_manifest import write_manifest
from iwm_fast.data.triplets import MANIFESTS
from iwm_fast.errors import UserError, because
from iwm_fast.outputs import require_folder

__all__ = ["Recording", "record"]

Pixels = NDArray[np.uint8]
Progress = Callable[[str, int, int | None], None]

_PLAYER = 0x6A3E  # the player's random stream; part of a recording's identity
_SPLITS = ("train", "test")
_GREY = 124  # near ImageNet's mean of red, which normalises to about 0
_FIRST = 96  # frames of the median


@dataclass(frozen=True)
class Recording:
    """What to record: the environment's id and arguments, the number of triplets per split, how to play and render.

    size: side of the frames, pixels. repeat: steps of the environment per action. episode_steps: decisions after which
    an episode is truncated, None: only the environment ends it. motion: the three channels are the grey frames of the
    last three steps, so that one frame shows speed. still: subtract the median of the first frames, about mid-grey, so
    that only what moves is visible. crop: left, top, right and bottom, as fractions of the rendered frame. names: of
    the choices, or of the components.
    """

    env: str
    train: int
    test: int
    size: int = 64
    seed: int = 0
    repeat: int = 1
    episode_steps: int | None = None
    motion: bool = False
    still: bool = False
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    names: tuple[str, ...] = ()
    arguments: Mapping[str, Any] | None = None


def record(recording: Recording, out: Path, progress: Progress | None = None) -> ExternalActions:
    """Write out/train and out/test, each with manifest.jsonl and frames/. Return the description of the actions.

    The folder is renamed into place when complete. Raises UserError if gymnasium is missing, the environment cannot be
    made, rendered or played at random, or `out` exists or cannot be written.
    """
    left, top, right, bottom = recording.crop
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(f"--crop: {recording.crop}: left, top, right, bottom must ascend between 0 and 1")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out, or remove it")
    require_folder(out.parent)
    env = _make(recording)
    try:
        actions = _named(_actions(env, recording.env), recording.names)
        background = _background(recording, env) if recording.still else None
        episode = 0
        with whole_folder(out) as partial:
            for part, count in zip(_SPLITS, (recording.train, recording.test), strict=True):
                if count:
                    episode = _write(recording, env, actions, background, partial / part, count, episode, progress)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error
    finally:
        env.close()
    return actions


def _make(recording: Recording) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import gymnasium
        from gymnasium.error import Error
    except ImportError as error:
        raise UserError("data record needs gymnasium and pygame: pip install 'iwm-fast[games]'") from error
    try:
        return gymnasium.make(
            recording.env, render_mode="rgb_array", disable_env_checker=True, **(recording.arguments or {})
        )
    except (Error, TypeError, ValueError, ImportError, ModuleNotFoundError, AssertionError) as error:
        raise UserError(f"{recording.env}: gymnasium cannot make it: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _actions(env: Any, name: str) -> ExternalActions:
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
    raise UserError(f"{name}: its actions are {space}; a Discrete space or a Box with finite bounds can be recorded")


def _named(actions: ExternalActions, names: tuple[str, ...]) -> ExternalActions:
    if not names:
        return actions
    if len(names) != len(actions.names) or len(set(names)) != len(names):
        raise UserError(f"--names: {', '.join(names)}: give {len(actions.names)} different names")
    return actions.model_copy(update={"names": names})


def _write(
    recording: Recording,
    env: Any,
    actions: ExternalActions,
    background: Pixels | None,
    folder: Path,
    count: int,
    first_episode: int,
    progress: Progress | None,
) -> int:
    """Write `count` triplets to a folder; return the number of the next episode."""
    (folder / "frames").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    episode = first_episode
    while len(rows) < count:
        before = None
        for step, (picture, action) in enumerate(_play(recording, env, episode)):
            name = f"frames/{episode:06d}_{step:05d}.png"
            Image.fromarray(_moving(picture, background)).save(folder / name)
            if before is not None:
                rows.append({"source": before, "target": name, "action": action, "episode": episode, "step": step - 1})
                if progress is not None:
                    progress(f"record {folder.name}", len(rows), count)
            before = name
            if len(rows) == count:
                break
        episode += 1
    write_manifest(folder / MANIFESTS[0], actions, rows)
    return episode


def _background(recording: Recording, env: Any) -> Pixels:
    """Return the median of the first frames of the first episodes, (size, size, 3)."""
    pictures: list[Pixels] = []
    episode = 0
    while len(pictures) < _FIRST:
        pictures += [picture for picture, _ in _play(recording, env, episode)][: _FIRST - len(pictures)]
        episode += 1
    return np.asarray(np.median(np.stack(pictures), axis=0), np.uint8)


def _moving(picture: Pixels, background: Pixels | None) -> Pixels:
    """Return the frame, or its difference to the background, centred on mid-grey and clipped."""
    if background is None:
        return picture
    return np.asarray(np.clip(picture.astype(np.int16) - background + _GREY, 0, 255), np.uint8)


def _play(recording: Recording, env: Any, episode: int) -> Iterator[tuple[Pixels, Any]]:
    """Yield the frames of an episode, each with the action that led to it (None for the first)."""
    offset = 0 if not hasattr(env.action_space, "start") else int(env.action_space.start)
    env.reset(seed=int(uniforms(recording.seed, episode, 0, _PLAYER, 1)[0, 0] * 2**31))
    recent = [_draw(recording, env)] * 3
    yield _picture(recording, recent), None
    decision = 0
    while recording.episode_steps is None or decision < recording.episode_steps:
        decision += 1
        written, given = _choose(recording, env.action_space, episode, decision, offset)
        over = False
        for held in range(recording.repeat):
            _, _, terminated, truncated, _ = env.step(given)
            over = terminated or truncated
            if over or held >= recording.repeat - (
                3 if recording.motion else 1
            ):  # frames that no picture shows are not rendered
                recent = [*recent[1:], _draw(recording, env)]
            if over:
                break
        if over and recording.motion and held < recording.repeat - 1 and recording.repeat > 3:
            return  # the steps before the end were not rendered, so its frame cannot show them
        yield _picture(recording, recent), written
        if over:
            return


def _choose(recording: Recording, space: Any, episode: int, decision: int, offset: int) -> tuple[Any, Any]:
    """Sample an action; return it for the manifest and for the environment."""
    if hasattr(space, "n"):
        choice = int(uniforms(recording.seed, episode, decision, _PLAYER, 1)[0, 0] * int(space.n))
        return choice, choice + offset
    low, high = space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float)
    sampled = low + (high - low) * uniforms(recording.seed, episode, decision, _PLAYER, len(low))[0]
    given = np.clip(sampled.astype(space.dtype), space.low.reshape(-1), space.high.reshape(-1))
    return given.astype(float).tolist(), given.reshape(space.shape)


def _draw(recording: Recording, env: Any) -> Image.Image:
    """Render the environment; return the crop, resized to a square."""
    from gymnasium.error import Error

    try:
        drawn = env.render()
    except Error as error:  # pygame is missing, say
        raise UserError(f"{recording.env}: cannot be rendered: {_line(error)}") from error
    if not isinstance(drawn, np.ndarray) or drawn.ndim != 3 or drawn.shape[2] != 3:
        raise UserError(f"{recording.env}: does not render RGB frames; choose another environment")
    picture = Image.fromarray(np.asarray(drawn, np.uint8))
    left, top, right, bottom = recording.crop
    box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    return picture.resize((recording.size, recording.size), Image.Resampling.BOX, box)


def _picture(recording: Recording, recent: list[Image.Image]) -> Pixels:
    """Return the current frame, or the last three steps as its three channels, the oldest first."""
    if not recording.motion:
        return np.asarray(recent[-1], np.uint8)
    return np.stack([np.asarray(one.convert("L"), np.uint8) for one in recent], axis=2)
