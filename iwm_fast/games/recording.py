"""What a recording of a game is: how its environment is made, played and drawn. It stands beside the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.errors import UserError

__all__ = ["Recording", "check_crop", "read_recording", "write_recording"]

Pixels = NDArray[np.uint8]

SCHEMA = "iwm-fast-recording/1"
_FILE, _BACKGROUND = "recording.json", "background.png"


@dataclass(frozen=True)
class Recording:
    """What to record: the environment's id and arguments, the number of triplets per split, how to play and render.

    size: side of the frames, pixels. repeat: steps of the environment per action. episode_steps: decisions after which
    an episode is truncated, None: only the environment ends it. motion: the three channels are the grey frames of the
    last three steps, so that one frame shows speed. still: subtract the median of the first frames, about mid-grey, so
    that only what moves is visible. crop: left, top, right and bottom, as fractions of the rendered frame. names: of
    the choices, or of the components. persistence: probability that an action is that of the step before. reset:
    options of the environment's reset. absorbing: an episode that the environment ended stays as it ended, at rest,
    whatever is done; one triplet says so.
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
    persistence: float = 0.0
    reset: Mapping[str, Any] = field(default_factory=dict)
    absorbing: bool = False


def check_crop(recording: Recording) -> None:
    """Raise UserError for a crop that is no part of a frame."""
    left, top, right, bottom = recording.crop
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(f"--crop: {recording.crop}: left, top, right, bottom must ascend between 0 and 1")


def write_recording(folder: Path, recording: Recording, background: Pixels | None) -> None:
    """Write the recording beside its manifest, with the background that was subtracted. Raises OSError."""
    text = json.dumps({"schema": SCHEMA, **asdict(recording)}, indent=2)
    (folder / _FILE).write_text(text + "\n", encoding="utf-8")
    if background is not None:
        Image.fromarray(background).save(folder / _BACKGROUND)


def read_recording(folder: Path) -> tuple[Recording, Pixels | None] | None:
    """Return the recording of a folder and its background, or None where no game was recorded into it.

    Raises UserError where its file is damaged.
    """
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        schema = told.pop("schema")
        told |= {name: tuple(told[name]) for name in ("crop", "names")}
        recording = Recording(**told)
        check_crop(recording)
        background = np.asarray(Image.open(folder / _BACKGROUND).convert("RGB")) if recording.still else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); record the game again") from error
    if schema != SCHEMA:
        raise UserError(f"{file}: schema is {schema!r}, not {SCHEMA}; record the game again")
    return recording, background
