"""Garbage is collected at the chosen steps only."""

from __future__ import annotations

import gc
import weakref

from iwm_fast.engine.garbage import EVERY_STEPS, Upkeep


class Knot:
    """A reference cycle: only a collection can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_a_knot_is_collected_at_the_chosen_step_and_not_before():
    with Upkeep() as upkeep:
        gone = weakref.ref(Knot())
        for step in range(1, EVERY_STEPS):
            upkeep.after(step)
            assert gone() is not None
        upkeep.after(EVERY_STEPS)
        assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
