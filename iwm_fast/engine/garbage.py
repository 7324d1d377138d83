"""Python's garbage, collected at chosen steps instead of whenever its counters say.

A collection of the oldest generation walks every object that torch and DeepSpeed have made. On many ranks each waits
for all the others' collections, which come at different steps; here all collect at the same one.
"""

from __future__ import annotations

import gc
from types import TracebackType

__all__ = ["EVERY_STEPS", "Upkeep"]

EVERY_STEPS = 50


class Upkeep:
    """While entered, Python collects garbage at every ``EVERY_STEPS``-th step only.

    What was alive on entering (modules, model, engine) is left out of the collections.
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
        """To be called after each step, by every rank."""
        if step % EVERY_STEPS == 0:
            gc.collect()
