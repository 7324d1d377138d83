"""Progress of a training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]

# Without a terminal at most one line in this many seconds, so that a log of days stays readable.
PLAIN_EVERY_S = 10.0


class TrainingProgress:
    """Show steps, loss, images/s and time left; on the first rank only."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._total = total
        self._shown = shown
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._begin, self._begun_at, self._last_line = done, time.monotonic(), 0.0
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("pretrain"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("steps", total=total, completed=done, said="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a permanent line."""
        if not self._shown:
            return
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """Update after each step; ``record`` where this step was logged."""
        if not self._shown:
            return
        said = f"loss {record['loss']:.4f}  {record['images_per_s']:.0f} images/s" if record else None
        if said and record and "padded" in record:
            said += f"  {record['padded']:.1%} padded"
        if self._bar:
            self._bar.update(self._task, completed=step)
            if said:
                self._bar.update(self._task, said=said)
        elif said and (time.monotonic() - self._last_line >= PLAIN_EVERY_S or step >= self._total):
            self._last_line = time.monotonic()
            left = (self._total - step) * (self._last_line - self._begun_at) / max(1, step - self._begin)
            print(f"step {step}/{self._total}  {said}  {_duration(left)} left", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
