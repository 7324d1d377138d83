"""Count skipped steps, whose loss or gradient was not finite, with their samples.

Only the device knows whether a step was skipped, and reading its flag makes the host wait. So flags are collected with
their samples and read together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.errors import UserError

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Counts skipped steps; more than ``limit`` in a row end the run and write every rank's samples to
    ``file``, if any.
    """

    def __init__(self, limit: int, file: Path | None, ranks: Ranks) -> None:
        self._limit, self._file, self._ranks = limit, file, ranks
        self._steps: list[dict[str, Any]] = []
        self.count = 0  # of all that were read, in this launch
        self._unread: list[tuple[Tensor, int, list[int], list[int]]] = []

    @property
    def in_a_row(self) -> int:
        """Skipped steps since the last one that was not, among those read."""
        return len(self._steps)

    def note(self, flag: Tensor, step: int, epochs: list[int], ids: list[int]) -> None:
        """Store a step's flag, 1.0 where all ranks skipped it; ``epochs`` and ``ids`` are this rank's samples."""
        self._unread.append((flag, step, epochs, ids))

    def read(self) -> int:
        """Read the flags since the last call, on all ranks alike; return how many steps were not skipped.

        Raises UserError on every rank where more than the limit were skipped in a row; the first has written the
        samples then.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return 0
        flags = torch.stack([flag for flag, *_ in unread]).tolist()  # the host waits for the device
        for skipped, (_, step, epochs, ids) in zip(flags, unread, strict=True):
            if skipped:
                self._add(step, epochs, ids)
            else:
                self._steps.clear()
        return flags.count(0.0)

    def _add(self, step: int, epochs: list[int], ids: list[int]) -> None:
        self.count += 1
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
        where, look = (f"{self._file} has the sample ids; ", ", or look at these samples") if self._file else ("", "")
        raise UserError(
            f"step {step}: loss or gradient not finite in {len(self._steps)} steps in a row; "
            f"{where}lower train.lr, set train.clip{look}"
        )
