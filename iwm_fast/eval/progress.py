"""How evaluations tell of their work."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
