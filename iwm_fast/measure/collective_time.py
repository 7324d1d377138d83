"""Measure how long a process waits in `torch.distributed`'s collectives; `collective_bytes` counts their bytes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

__all__ = ["CollectiveTime", "timed_collectives"]

_NAMES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "broadcast", "reduce", "all_to_all_single", "_all_gather_base",
    "_reduce_scatter_base",
)  # fmt: skip


@dataclass
class CollectiveTime:
    """Seconds that the host waited. entered, left: called when a wait begins and ends."""

    seconds: float = 0.0
    entered: Callable[[], None] = lambda: None
    left: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside to the seconds."""
        self.entered()
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.left()


class _Work:
    """A collective in flight: waiting for it counts."""

    def __init__(self, work: Any, spent: CollectiveTime) -> None:
        self._work, self._spent = work, spent

    def wait(self, *arguments: Any) -> Any:
        """Wait for the work."""
        with self._spent.timed():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def timed_collectives() -> Iterator[CollectiveTime]:
    """Time the collectives called inside. Enter it before DeepSpeed starts: it keeps references to them."""
    spent, inside = CollectiveTime(), [False]
    originals = {name: getattr(dist, name) for name in _NAMES if hasattr(dist, name)}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            if inside[0]:  # a collective that calls another
                return original(*arguments, **options)
            inside[0] = True
            try:
                with spent.timed():
                    work = original(*arguments, **options)
            finally:
                inside[0] = False
            return work if work is None else _Work(work, spent)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, wrap(original))
        yield spent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
