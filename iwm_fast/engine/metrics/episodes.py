"""Warnings in a training's log: one per episode of a fault, and the next only after the fault was gone for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["CLEAR", "Episode", "FaultWatch"]

# Logged steps without the fault that end an episode. A fault that comes and goes would otherwise fill the log.
CLEAR = 3


class Episode:
    """Decide whether a fault is reported."""

    def __init__(self) -> None:
        self._open = False
        self._clear = 0

    def begins(self, seen: bool, *, gone: bool | None = None) -> bool:
        """Return True at the first logged step of an episode. Call it at each logged step. ``gone``: whether the step
        counts as one without the fault; default: if it was not seen.
        """
        if seen:
            begun, self._open, self._clear = not self._open, True, 0
            return begun
        self._clear = self._clear + 1 if (not seen if gone is None else gone) else 0
        if self._clear >= CLEAR:
            self._open = False
        return False


class FaultWatch:
    """The first rank's warnings about undecodable images and skipped steps, once per episode."""

    def __init__(self, max_skipped: int, bad_file: Path) -> None:
        self._max_skipped, self._bad_file = max_skipped, bad_file
        self._skipping, self._undecodable = Episode(), Episode()
        self._bad = 0

    def look(self, record: dict[str, Any], skipped: int) -> list[str]:
        """Return the lines for a logged step. ``skipped``: steps skipped since the previous logged step."""
        step, bad = record["step"], record.get("bad_samples", 0)
        lines = []
        if self._skipping.begins(skipped > 0):
            lines.append(
                f"step {step}: loss or gradient not finite in {skipped} step(s) since the last logged one; such steps "
                f"change no weight, and more than {self._max_skipped} in a row end the run (train.max_skipped). If it "
                "continues, lower train.lr, set train.clip or lengthen train.warmup"
            )
        if self._undecodable.begins(bad > self._bad):
            lines.append(
                f"step {step}: {bad} image(s) cannot be decoded and are replaced; {self._bad_file} lists them with the "
                "reasons; iwm-fast data verify finds all"
            )
        self._bad = max(self._bad, bad)
        return lines
