"""Triplets: pairs of images with the action that leads from one to the other, listed in a manifest.

docs/guides/triplets.md has the format: JSON Lines or Parquet, one triplet per row {source, target, action[, episode]
[, step][, source_state, target_state]}, and a header beside it or in the first line that describes the actions. An
error is one line with the file and line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.config.registry import SOURCES
from iwm_fast.config.schema import Config, ExternalActions
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.triplet_manifest import Line, header_of, lines_of
from iwm_fast.data.triplet_windows import require_windows
from iwm_fast.errors import UserError

__all__ = ["MANIFESTS", "Triplets", "find_manifest", "read_triplets", "resolve_triplets"]

MANIFESTS = ("manifest.jsonl", "manifest.parquet")
_KEYS = ("source", "target", "action", "episode", "step", "source_state", "target_state")
_CHOICES = 4096  # most choices of a discrete action: each is a component of the vector


@dataclass(frozen=True, eq=False)
class Triplets:
    """n triplets over m image files, in the manifest's order: triplet i has sample id i.

    frames: the image files, each once. source and target: int64 (n,), indices into `frames`. values: float64 (n, C) or,
    for discrete actions, int64 (n,). episode: int64 (n,), numbers from 0, or None. step: int64 (n,), or None. states:
    float64 (m, S), what each frame shows in numbers, or None.
    """

    manifest: Path
    frames: ImageSet
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    values: NDArray[Any]
    episode: NDArray[np.int64] | None
    step: NDArray[np.int64] | None
    actions: ExternalActions
    states: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def describe(self) -> str:
        """Return a description, to follow their number."""
        return f"triplets of {len(self.frames)} pictures"

    def vectors(self) -> NDArray[np.float32]:
        """Return the action vectors, float32 (n, A)."""
        return ExternalSpace(self.actions).encode_values(self.values)


def find_manifest(root: Path) -> Path | None:
    """Return the manifest that `root` is or holds, or None. Raises UserError where a folder holds two."""
    if root.is_file():
        return root if root.suffix in {".jsonl", ".parquet"} else None
    found = [root / name for name in MANIFESTS if (root / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{root} holds {MANIFESTS[0]} and {MANIFESTS[1]}; name one of them, or remove one")
    return found[0] if found else None


def resolve_triplets(config: Config) -> tuple[Config, Triplets | None]:
    """Return (configuration with its actions, triplets of `data.root`); None instead of triplets for images.

    Raises UserError where the configuration's groups and the data do not match.
    """
    external = config.actions.is_external
    root = Path(config.data.root or "")
    images_alone = config.data.source == "folder" or SOURCES.own(config.data.source) is not None
    manifest = None if images_alone else find_manifest(root)
    if manifest is None:
        if external:
            raise UserError(
                f"data.root: {root}: actions.groups is [external], and this is no manifest of triplets: give a .jsonl "
                f"or .parquet file, or a folder that holds {' or '.join(MANIFESTS)}"
            )
        return config, None
    if not external:
        raise UserError(
            f"data.root: {manifest}: a manifest of triplets has actions of its own: set actions.groups=[external], "
            "or data.source=folder for its pictures alone"
        )
    triplets = read_triplets(manifest, config.actions.external)
    require_windows(triplets, config.model.history)
    require_windows(triplets, config.train.horizon, "train.horizon")
    actions = config.actions.model_copy(update={"external": triplets.actions})
    return config.model_copy(update={"actions": actions}), triplets


def read_triplets(manifest: Path, known: ExternalActions | None = None) -> Triplets:
    """Read a whole manifest. known: the actions that a run recorded; the manifest must agree.

    Raises UserError with the file and line of an error. Decoding of the images is checked later.
    """
    header, rows = header_of(manifest), list(lines_of(manifest))
    if not rows:
        raise UserError(f"{manifest}: holds no triplet; give one per line: {{source, target, action}}")
    for line in rows:
        _check_keys(line, rows[0])
    places: dict[str, int] = {}
    ends = [
        np.array([places.setdefault(_path(line, key), len(places)) for line in rows], np.int64)
        for key in ("source", "target")
    ]
    values = _values(rows)
    actions = _described(manifest, header, values, known)
    _check_values(rows, values, actions, strict=header is not None and known is None)
    return Triplets(
        manifest=manifest,
        frames=ImageSet(FolderSource(LocalStorage(manifest.parent), list(places))),
        source=ends[0],
        target=ends[1],
        values=values,
        episode=_episodes(rows) if "episode" in rows[0].row else None,
        step=_steps(rows) if "step" in rows[0].row else None,
        actions=actions,
        states=_states(rows, ends) if "source_state" in rows[0].row else None,
    )


def _check_keys(line: Line, first: Line) -> None:
    unknown = [key for key in line.row if key not in _KEYS]
    if unknown:
        raise line.error(f"unknown key {unknown[0]!r}; allowed: {', '.join(_KEYS)}")
    missing = [key for key in _KEYS[:3] if key not in line.row]
    if missing:
        raise line.error(f"{missing[0]} is missing; a triplet has source, target and action")
    for key in _KEYS[3:]:
        if (key in line.row) != (key in first.row):
            raise line.error(f"{key} must stand in every line or in none")
    if ("source_state" in line.row) != ("target_state" in line.row):
        raise line.error("source_state and target_state must stand together, or neither")


def _path(line: Line, key: str) -> str:
    value = line.row[key]
    if not isinstance(value, str) or not value:
        raise line.found(key, "the path of a picture, relative to the manifest")
    return value


def _number(value: Any) -> bool:
    """A finite number, far enough from float64's limit that differences are finite too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _values(rows: list[Line]) -> NDArray[Any]:
    """The actions: int64 (n,) for whole numbers, float64 (n, C) for lists."""
    first = rows[0].row["action"]
    if _whole(first):
        for line in rows:
            if not _whole(line.row["action"]) or not 0 <= line.row["action"] < _CHOICES:
                raise line.found("action", f"a whole number from 0 to {_CHOICES - 1}, one choice of several")
        return np.array([line.row["action"] for line in rows], np.int64)
    if not isinstance(first, list) or not first:
        raise rows[0].found("action", "a list of numbers, or a whole number for one choice of several")
    for line in rows:
        action = line.row["action"]
        if not isinstance(action, list) or len(action) != len(first) or not all(map(_number, action)):
            count = f"{len(first)} number{'s' if len(first) > 1 else ''}"
            raise line.found("action", f"a list of {count}, as in {rows[0].where}")
    return np.array([line.row["action"] for line in rows], np.float64)


def _described(
    manifest: Path, header: ExternalActions | None, values: NDArray[Any], known: ExternalActions | None
) -> ExternalActions:
    """The description of the actions: the run's, the header's, or what the rows contain."""
    kind = "discrete" if values.ndim == 1 else "continuous"
    for given, whose in ((header, "its header says"), (known, "the run was trained on")):
        if given is None:
            continue
        if given.kind != kind:
            raise UserError(f"{manifest}: its actions are {kind}, and {whose} {given.kind} ones")
        if given.kind == "continuous" and len(given.names) != values.shape[1]:
            raise UserError(
                f"{manifest}: its actions have {values.shape[1]} components, and {whose} {len(given.names)} "
                f"({', '.join(given.names)})"
            )
    if header is not None and known is not None and header.names != known.names:
        raise UserError(
            f"{manifest}: its actions are {', '.join(header.names)}, and the run was trained on "
            f"{', '.join(known.names)}"
        )
    return known or header or _found(values)


def _found(values: NDArray[Any]) -> ExternalActions:
    """The description from the rows: choices 0 to the largest, or components between the lowest and the highest
    value.
    """
    if values.ndim == 1:
        return ExternalActions(kind="discrete", names=tuple(str(choice) for choice in range(int(values.max()) + 1)))
    low, high = values.min(axis=0), values.max(axis=0)
    neutral = np.where((low <= 0) & (high >= 0), 0.0, low + (high - low) / 2)
    return ExternalActions(
        kind="continuous",
        names=tuple(f"action_{place}" for place in range(values.shape[1])),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        neutral=tuple(neutral.tolist()),
    )


def _check_values(rows: list[Line], values: NDArray[Any], actions: ExternalActions, *, strict: bool) -> None:
    """Raise UserError for an unknown choice, or a value outside of a declared range; a range found in rows does
    not bind.
    """
    if actions.kind == "discrete":
        wrong = np.flatnonzero(values >= len(actions.names))
        allowed = f"a whole number from 0 to {len(actions.names) - 1} ({', '.join(actions.names)})"
    else:
        outside = (values < np.array(actions.low)) | (values > np.array(actions.high))
        wrong = np.flatnonzero(outside.any(axis=1)) if strict else np.zeros(0, np.int64)
        allowed = f"numbers from {list(actions.low)} to {list(actions.high)}, as the header says"
    if len(wrong):
        raise rows[int(wrong[0])].found("action", allowed)


def _episodes(rows: list[Line]) -> NDArray[np.int64]:
    numbers: dict[Any, int] = {}
    for line in rows:
        name = line.row["episode"]
        if not (_whole(name) or isinstance(name, str)):
            raise line.found("episode", "a whole number or a text")
        numbers.setdefault(name, len(numbers))
    return np.array([numbers[line.row["episode"]] for line in rows], np.int64)


def _steps(rows: Iterable[Line]) -> NDArray[np.int64]:
    steps = []
    for line in rows:
        if not _whole(line.row["step"]):
            raise line.found("step", "a whole number")
        steps.append(line.row["step"])
    return np.array(steps, np.int64)


def _states(rows: list[Line], ends: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The state of each frame; a frame that several rows name must have one state."""
    first = rows[0].row["source_state"]
    size = len(first) if isinstance(first, list) else 0
    if size == 0:
        raise rows[0].found("source_state", "a list of numbers")
    states = np.full((1 + max(int(end.max()) for end in ends), size), np.nan)
    for number, line in enumerate(rows):
        for key, end in zip(("source_state", "target_state"), ends, strict=True):
            told = line.row[key]
            if not isinstance(told, list) or len(told) != size or not all(map(_number, told)):
                raise line.found(key, f"a list of {size} number{'s' if size > 1 else ''}, as in {rows[0].where}")
            place = end[number]
            if not np.isnan(states[place, 0]) and states[place].tolist() != told:
                raise line.error(f"{key}: {line.row[key.split('_')[0]]} has another state in an earlier row")
            states[place] = told
    return states
