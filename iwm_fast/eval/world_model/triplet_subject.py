"""What evaluations of triplets measure: a model, the frames, and what is kept of them for the report."""

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

    bank: next frames that are ranked and queried, default ``eval.bank``. examples: how many of what was ranked are kept
    for the report, in ``shown``.
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
        """What gets (done, of how many) of a part of the work."""
        return part_of(self.progress, what)

    def missing(self, need: Need) -> str | None:
        """Why a need is not met: triplets have neither classes nor a training part nor jitter."""
        return f"triplets have no {need}"
