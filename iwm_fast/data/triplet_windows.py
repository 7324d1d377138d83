"""Consecutive triplets: which follows which, and the frames before each.

A triplet follows another if its source file is the other's target, and they are of one episode and of successive steps
where the manifest has these. Where several could follow, or precede, none does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from iwm_fast.errors import UserError

if TYPE_CHECKING:
    from iwm_fast.data.triplets import Triplets

__all__ = ["continuations", "followers", "require_windows", "windows"]

Ints = NDArray[np.int64]


def followers(triplets: Triplets) -> Ints:
    """Return the triplet that follows each, int64 (n,), or −1."""
    nothing = np.zeros(len(triplets), np.int64)
    episode = nothing if triplets.episode is None else triplets.episode
    step, one = (nothing, 0) if triplets.step is None else (triplets.step, 1)
    begins: dict[tuple[int, int, int], int] = {}
    for row, key in enumerate(zip(episode.tolist(), step.tolist(), triplets.source.tolist(), strict=True)):
        begins[key] = -1 if key in begins else row
    ends = zip(episode.tolist(), (step + one).tolist(), triplets.target.tolist(), strict=True)
    return np.array([begins.get(key, -1) for key in ends], np.int64)


def windows(triplets: Triplets, history: int) -> Ints:
    """Return the files of each triplet's source, int64 (n, history): the frames up to its own, the oldest first.

    Before an episode's first frame stands that frame again.
    """
    frames = triplets.source[:, None]
    before = _predecessors(triplets) if history > 1 else np.zeros(0, np.int64)
    rows = np.arange(len(triplets))
    for _ in range(history - 1):
        earlier = before[rows]
        rows = np.where(earlier < 0, rows, earlier)
        frames = np.concatenate([triplets.source[rows][:, None], frames], axis=1)
    return frames


def continuations(triplets: Triplets, horizon: int) -> Ints:
    """Return each triplet and those that follow it, int64 (n, horizon), −1 after the end of its episode."""
    after = np.append(followers(triplets) if horizon > 1 else np.zeros(0, np.int64), -1)  # of −1: none
    rows = np.arange(len(triplets))[:, None]
    for _ in range(horizon - 1):
        rows = np.concatenate([rows, after[rows[:, -1:]]], axis=1)
    return rows


def require_windows(triplets: Triplets, history: int, key: str = "model.history") -> None:
    """Raise UserError where consecutive triplets are needed, `history` of them, and the manifest shows none.

    key: of the configuration, which asks for them.
    """
    if history == 1:
        return
    if triplets.episode is None:
        raise UserError(
            f"{triplets.manifest}: its rows have no episode, and {key} is {history}: give each row its episode (and "
            f"step), so that the rows before and after it are known, or set {key}=1"
        )
    if not (followers(triplets) >= 0).any():
        raise UserError(
            f"{triplets.manifest}: no row's source is the target of the row before it in its episode, and {key} is "
            f"{history}: name a frame alike where it is a target and the next source, or set {key}=1"
        )


def _predecessors(triplets: Triplets) -> Ints:
    """The triplet before each, int64 (n,), or −1."""
    after = followers(triplets)
    found, count = np.full(len(triplets), -1, np.int64), np.bincount(after[after >= 0], minlength=len(triplets))
    rows = np.flatnonzero(after >= 0)
    found[after[rows]] = rows
    found[count > 1] = -1
    return found
