"""Record triplets from a gymnasium environment: a rendered frame, the action of a random player, the next frame.

Where the environment observes numbers, they are recorded as the state of each frame.

The player samples each action uniformly, or with the recording's persistence keeps the last one, and repeats it for
`repeat` steps of the environment, so that its effect is visible. Actions are a function of (seed, episode, decision),
each episode resets the environment with its own seed, and the test episodes are numbered after the training episodes:
the same command gives the same files. No display is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
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
from iwm_fast.games.play import Game
from iwm_fast.games.recording import Pixels, Recording, check_crop, write_recording
from iwm_fast.notices import tell_once
from iwm_fast.outputs import require_folder

__all__ = ["Recording", "episode_seed", "record", "sampled_action"]

Progress = Callable[[str, int, int | None], None]

_PLAYER = 0x6A3E  # the player's random stream; part of a recording's identity
_SPLITS = ("train", "test")
_FIRST = 96  # frames of the median
_VAIN = 100  # episodes in succession without a triplet, after which the recording ends


def record(recording: Recording, out: Path, progress: Progress | None = None) -> ExternalActions:
    """Write out/train and out/test, each with manifest.jsonl, frames/ and recording.json. Return the description of
    the actions.

    The folder is renamed into place when complete. Raises UserError if gymnasium is missing, the environment cannot be
    made, rendered or played at random, shows no action's effect, or `out` exists or cannot be written.
    """
    check_crop(recording)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out, or remove it")
    require_folder(out.parent)
    game = Game(recording)
    try:
        actions = _named(game.actions, recording.names)
        game.background = _background(game) if recording.still else None
        episode = 0
        with whole_folder(out) as partial:
            for part, count in zip(_SPLITS, (recording.train, recording.test), strict=True):
                if count:
                    episode = _write(game, actions, partial / part, count, episode, progress)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error
    finally:
        game.close()
    return actions


def _named(actions: ExternalActions, names: tuple[str, ...]) -> ExternalActions:
    if not names:
        return actions
    if len(names) != len(actions.names) or len(set(names)) != len(names):
        raise UserError(f"--names: {', '.join(names)}: give {len(actions.names)} different names")
    return actions.model_copy(update={"names": names})


def _write(
    game: Game, actions: ExternalActions, folder: Path, count: int, first_episode: int, progress: Progress | None
) -> int:
    """Write `count` triplets to a folder; return the number of the next episode."""
    (folder / "frames").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    pictures = empty = vain = 0
    episode = first_episode
    while len(rows) < count:
        before = state = first = None
        for step, (picture, action) in enumerate(_play(game, episode)):
            name = f"frames/{episode:06d}_{step:05d}.png"
            now = None if (numbers := game.state) is None else numbers.tolist()
            if before is None:
                first = picture  # written with the second, if there is one
            else:
                for path, shown in ((before, first), (name, picture)):
                    if shown is not None:
                        Image.fromarray(shown).save(folder / path)
                        pictures, empty = pictures + 1, empty + game.empty(shown)
                first = None
                row = {"source": before, "target": name, "action": action, "episode": episode, "step": step - 1}
                rows.append({**row, "source_state": state, "target_state": now})
                if progress is not None:
                    progress(f"record {folder.name}", len(rows), count)
            before, state = name, now
            if len(rows) == count:
                break
        vain = vain + 1 if first is not None else 0
        if vain == _VAIN:
            raise UserError(
                f"{game.recording.env}: {_VAIN} episodes in succession ended before a second picture, which an action "
                "leads to: lower --action-repeat, or record ends with --absorbing"
            )
        episode += 1
    if empty:
        tell_once(
            f"{folder.name}: {empty:,} of {pictures:,} pictures show nothing that moves: it is out of sight there; "
            "where --crop cuts it off, widen it"
        )
    if any(None in (row["source_state"], row["target_state"]) for row in rows):
        tell_once(f"{game.recording.env}: no states are recorded: its observations are not up to 256 finite numbers")
        rows = [{key: value for key, value in row.items() if not key.endswith("_state")} for row in rows]
    write_manifest(folder / MANIFESTS[0], actions, rows)
    write_recording(folder, game.recording, game.background)
    return episode


def _background(game: Game) -> Pixels:
    """Return the median of the first frames of the first episodes, (size, size, 3)."""
    pictures: list[Pixels] = []
    episode = 0
    while len(pictures) < _FIRST:
        pictures += [picture for picture, _ in islice(_play(game, episode), _FIRST - len(pictures))]
        episode += 1
    return np.asarray(np.median(np.stack(pictures), axis=0), np.uint8)


def _play(game: Game, episode: int) -> Iterator[tuple[Pixels, Any]]:
    """Yield the frames of an episode, each with the action that led to it (None for the first)."""
    recording = game.recording
    game.reset(episode_seed(recording.seed, episode))
    yield game.picture(), None
    decision, action = 0, None
    while recording.episode_steps is None or decision < recording.episode_steps:
        decision += 1
        action = sampled_action(game, episode, decision, action)
        held = game.hold(action)
        if not held.shown:
            return  # the steps before the end were not rendered, so its frame cannot show them
        yield game.picture(), _told(action)
        if held.terminated and recording.absorbing:
            yield game.picture(), _told(sampled_action(game, episode, decision + 1, action))
        if held.over:
            return


def _told(action: int | NDArray[Any]) -> int | list[float]:
    return action if isinstance(action, int) else action.astype(float).tolist()


def episode_seed(seed: int, episode: int) -> int:
    """Return the seed that an episode resets the environment with."""
    return int(uniforms(seed, episode, 0, _PLAYER, 1)[0, 0] * 2**31)


def sampled_action(
    game: Game, episode: int, decision: int, last: int | NDArray[Any] | None = None
) -> int | NDArray[Any]:
    """Sample an action uniformly: a choice from 0, or numbers in the environment's type. ``last`` may be kept."""
    recording, space = game.recording, game.env.action_space
    count = 1 if game.actions.kind == "discrete" else len(game.actions.names)
    keep = recording.persistence > 0
    numbers = uniforms(recording.seed, episode, decision, _PLAYER, count + keep)[0]
    if keep and last is not None and numbers[-1] < recording.persistence:
        return last
    if game.actions.kind == "discrete":
        return int(numbers[0] * int(space.n))
    low, high = space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float)
    sampled = low + (high - low) * numbers[:count]
    given: NDArray[Any] = np.clip(sampled.astype(space.dtype), space.low.reshape(-1), space.high.reshape(-1))
    return given
