"""Find slow ranks: each rank's own time per step, gathered at logged steps only.

In a step every rank waits for the slowest, so whole steps last equally long on all. The time before the first message,
data and forward pass, differs. On a GPU events on its stream time the forward pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.engine.distributed.medians import medians_of_others
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.metrics.episodes import Episode

__all__ = ["OwnTime", "Stragglers", "over_ranks"]

_IN_A_ROW = 3  # logged steps; a single slow one may be another job's checkpoint, or a cold file


class OwnTime:
    """Sums the time of this rank's own work; ``take`` returns its mean per step and resets it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Work that the host waits for: data."""
        begin = time.perf_counter()
        yield
        self._host += time.perf_counter() - begin

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Work of the device: the forward pass."""
        if not self._on_gpu:
            with self.waiting():
                yield
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    def take(self, steps: int) -> float:
        """Return seconds per step. On a GPU it waits for the last forward pass, as reading the loss does anyway."""
        if self._events:
            self._events[-1][1].synchronize()
        total: float = self._host + sum(begin.elapsed_time(end) / 1e3 for begin, end in self._events)
        self._host, self._events = 0.0, []
        return total / max(1, steps)


def over_ranks(mine: dict[str, float | None], ranks: Ranks) -> dict[str, list[float]]:
    """Return every rank's value of each key, by rank; NaN for None. All ranks call it with the same keys."""
    values = torch.tensor([float("nan") if v is None else float(v) for v in mine.values()], dtype=torch.float64)
    found = [values]
    if ranks.world > 1:
        on = values if ranks.control is not None or ranks.device.type == "cpu" else values.to(ranks.device)
        found = [torch.empty_like(on) for _ in range(ranks.world)]
        dist.all_gather(found, on, group=ranks.control)
    return {key: [float(row[i]) for row in found] for i, key in enumerate(mine)}


class Stragglers:
    """Finds a rank whose own time stays above `ratio` times the median of the others'."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._slow: dict[int, int] = {}
        self._episodes: dict[int, Episode] = {}

    def look(self, own_s: list[float], step_s: float) -> dict[str, Any] | None:
        """Return {rank, own_s, others_s} of a rank that has been slow in three logged steps in a row, or None.

        It is returned again only after it was fast in as many.

        Differences below a twentieth of the step do not count.
        """
        if len(own_s) == 1:
            return None
        named = None
        for rank, (seconds, others) in enumerate(zip(own_s, medians_of_others(own_s), strict=True)):
            slow = seconds > self._ratio * others and seconds - others > step_s / 20
            self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
            if self._episodes.setdefault(rank, Episode()).begins(self._slow[rank] >= _IN_A_ROW, gone=not slow):
                named = {"rank": rank, "own_s": seconds, "others_s": others}
        return named
