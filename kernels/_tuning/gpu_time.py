"""Seconds that a GPU takes for a call, without the time that the host takes to launch it.

Events around a call measure the host where it launches more slowly than the GPU computes: the GPU waits for the next
launch between the two. So the GPU is given something to wait with first, a kernel that spins, and is still spinning
when the call and both events are in its queue. Whether it was is asked each time; where it was not, the call is made
again behind a spin of twice the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["Event", "GpuQueue", "gpu_seconds"]

# Of a spin, in seconds: the first, a few launches long, and the longest. What needs more waits for the GPU itself.
_FIRST_SPIN, _LONGEST_SPIN = 1e-4, 0.2
# Cycles a second, at least: no GPU's clock is much faster.
_CLOCK = 2e9


class Event(Protocol):
    """A place in a GPU's queue, as `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Put it at the end of the queue."""

    def query(self) -> bool:
        """Whether the GPU has passed it."""

    def synchronize(self) -> None:
        """Wait until the GPU has passed it."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from here to `end` on the GPU."""


class GpuQueue:
    """The current stream of the current CUDA device."""

    def event(self) -> Event:
        """A new one, with a time."""
        return torch.cuda.Event(enable_timing=True)

    def spin(self, seconds: float) -> None:
        """Let the GPU do nothing for about so long, from when it comes to it."""
        torch.cuda._sleep(int(seconds * _CLOCK))  # noqa: SLF001  (torch's own tests fill the queue with it)


def gpu_seconds(
    call: Callable[[int], object], repeats: int, warm_up: int, queue: GpuQueue | None = None
) -> list[float]:
    """Seconds of each of `repeats` calls on the GPU, after `warm_up` that do not count.

    `call` gets a running number from 0, to rotate inputs. A call that itself waits for the GPU, or launches more than
    fits into the queue, cannot be kept apart from its host: it is timed with it.
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
