"""Long work, such as reading a file of gigabytes, tells whoever watches this process that it makes progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "note_progress"]

_listeners: list[Callable[[], None]] = []


def note_progress() -> None:
    """Note that long work has made progress."""
    for listener in tuple(_listeners):
        listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` at each `note_progress` of this process within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
