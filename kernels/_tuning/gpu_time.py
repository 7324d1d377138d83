"""GPU time of a call, without the host's launch time.

If the host launches more slowly than the GPU computes, events around a call measure the host: the GPU waits between
them for the next launch. So a spin kernel occupies the GPU until the call and both events are in its queue. Each
measurement checks that the spin lasted long enough; if not, the call is repeated behind a spin of twice the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["Event", "GpuQueue", "gpu_seconds"]

# Spin lengths in seconds: the first, a few launches long, and the longest. Calls that need longer synchronise
# themselves.
_FIRST_SPIN, _LONGEST_SPIN = 1e-4, 0.2
# A lower bound of clock cycles per second that no GPU exceeds by much.
_CLOCK = 2e9


class Event(Protocol):
    """A marker in a GPU's queue, like `torch.cuda.Event`."""

    def record(self) -> None:
        """Append it to the queue."""

    def query(self) -> bool:
        """Return whether the GPU has passed it."""

    def synchronize(self) -> None:
        """Wait until the GPU has passed it."""

    def elapsed_time(self, end: Any, /) -> float:
        """Return milliseconds from here to `end` on the GPU."""


class GpuQueue:
    """The current stream of the current CUDA device."""

    def event(self) -> Event:
        """Return a new timed event."""
        return torch.cuda.Event(enable_timing=True)

    def spin(self, seconds: float) -> None:
        """Keep the GPU busy for about this long, from when it reaches the spin."""
        torch.cuda._sleep(int(seconds * _CLOCK))  # noqa: SLF001  (torch's own tests fill the queue with it)


def gpu_seconds(
    call: Callable[[int], object], repeats: int, warm_up: int, queue: GpuQueue | None = None
) -> list[float]:
    """Return the GPU seconds of each of `repeats` calls, after `warm_up` calls.

    `call` gets a running number from 0, to rotate inputs. A call that synchronises, or launches more than fits into the
    queue, cannot be separated from its host: its host time is included.
    """
    queue = queue or GpuQueue()
    found: list[float] = []
    number, spin = 0, _FIRST_SPIN
    while len(found) < repeats:
        begin, end = queue.event(), queue.event()
        if spin:
            queue.spin(spin)
        begin.record()
        call(number)
        end.record()
        was_late = begin.query()
        end.synchronize()
        number += 1
        if number <= warm_up:
            continue
        if spin and was_late:
            spin = 2 * spin if 2 * spin <= _LONGEST_SPIN else 0.0
            continue
        found.append(begin.elapsed_time(end) / 1000)
    return found
