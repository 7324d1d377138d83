"""The input of triplet evaluations: a model, the frames, and examples for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.console import Count, part_of
from iwm_fast.eval.registry import Need
from iwm_fast.eval.world_model.examples import RankedExample
from iwm_fast.eval.world_model.frames import FrameReader
from iwm_fast.models.iwm import IWM

__all__ = ["TripletSubject"]


@dataclass
class TripletSubject:
    """A model and triplets of frames.

    bank: ranked and queried next frames, default ``eval.bank``. examples: number of rankings that ``shown`` records for
    the report.
    """

    model: IWM
    config: Config
    space: ActionSpace
    reader: FrameReader
    bank: int | None = None
    examples: int = 0
    progress: Count | None = None
    shown: list[RankedExample] = field(default_factory=list)

    def tell(self, what: str) -> Callable[[int, int], None] | None:
        """Return a callback for (done, total) of a part of the work."""
        return part_of(self.progress, what)

    def missing(self, need: Need) -> str | None:
        """Return why a need is not met: triplets have no classes, training part or jitter."""
        return f"triplets have no {need}"
