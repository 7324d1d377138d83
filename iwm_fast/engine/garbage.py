"""Collect Python's garbage at chosen steps instead of at random ones.

A collection of the oldest generation walks every object of torch and DeepSpeed. On many ranks each waits for all the
others' collections, which come at different steps; here all collect at the same step.
"""

from __future__ import annotations

import gc
from types import TracebackType

__all__ = ["EVERY_STEPS", "Upkeep"]

EVERY_STEPS = 50


class Upkeep:
    """While entered, Python collects garbage only every ``EVERY_STEPS`` steps.

    Objects alive on entering (modules, model, engine) are excluded.
    """

    def __init__(self) -> None:
        self._enabled = gc.isenabled()

    def __enter__(self) -> Upkeep:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()

    def after(self, step: int) -> None:
        """Call it after each step, on every rank."""
        if step % EVERY_STEPS == 0:
            gc.collect()
