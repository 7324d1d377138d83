"""Steps that were skipped because a loss or a gradient was not finite: how many in a row, and of which samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwm_fast.data.whole import write_whole_text
from iwm_fast.engine.distributed import Ranks, gather
from iwm_fast.errors import UserError

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Counts them; more than ``limit`` in a row end the run, with the samples of every rank in ``file``, if any."""

    def __init__(self, limit: int, file: Path | None, ranks: Ranks) -> None:
        self._limit, self._file, self._ranks = limit, file, ranks
        self._steps: list[dict[str, Any]] = []

    @property
    def in_a_row(self) -> int:
        """Skipped steps since the last one that was made."""
        return len(self._steps)

    def clear(self) -> None:
        """A step was made."""
        self._steps.clear()

    def add(self, step: int, epochs: list[int], ids: list[int]) -> None:
        """A step was skipped on all ranks; ``epochs`` and ``ids`` are this rank's samples.

        Raises UserError on every rank when it is one too many; the first has written the dump then.
        """
        self._steps.append({"step": step, "samples": list(zip(epochs, ids, strict=True))})
        if len(self._steps) <= self._limit:
            return
        everyone = gather(self._steps, self._ranks.world)
        if self._ranks.first and self._file is not None:
            dump = [
                {"step": own["step"], "samples": [s for steps in everyone for s in steps[at]["samples"]]}
                for at, own in enumerate(self._steps)
            ]
            body = {"schema": "iwm-fast-skipped-steps/1", "samples_are": ["epoch", "sample id"], "steps": dump}
            write_whole_text(self._file, json.dumps(body, indent=1) + "\n")
        raise UserError(
            f"step {step}: loss or gradient not finite in {len(self._steps)} steps in a row; "
            f"{self._file} has the sample ids; lower train.lr, set train.clip, or look at these samples"
        )
