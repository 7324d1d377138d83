"""The choices of a training run: one table for all ranks, and the same again where the run resumes.

Two timings of one product may give two answers, and every block size adds in an order of its own. Nothing is timed
within a step, where ranks wait for each other: a product that the table lacks is computed as what ships with the
package says, else as the table says of the nearest number of rows, else with the architecture's first candidate, and
then noted. So the first steps find what the run needs, and a later one that meets a new number of rows finds nothing.
Between steps, where all ranks meet, the first one times what any of them noted (`answer`), and
from the next step on all of them use its answers (`adopt`). The table says from which step on each choice holds, so
that a step that is made again, after a resume from before it, is computed as it was.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from iwm_fast.kernels._tuning.candidates import Choice, read_choice
from iwm_fast.kernels._tuning.tuner import FAILURES, Key, Tuner, device_tuner, key_of, nearest

from .made_calls import made_call

__all__ = ["Adopted", "Noted", "RunChoices", "read_adopted", "run_choices"]

T = TypeVar("T")


@dataclass(frozen=True)
class Adopted:
    """A choice, and the first step that is computed with it."""

    choice: Choice
    from_step: int = 0

    def document(self) -> dict[str, Any]:
        """For a file; `read_adopted` reads it."""
        return {"choice": asdict(self.choice), "from_step": self.from_step}


def read_adopted(entry: Any) -> Adopted | None:
    """What `Adopted.document` gave, or an entry of `tuned.json`, which holds from the start; else None."""
    choice = read_choice(entry)
    step = entry.get("from_step", 0) if choice else None
    return Adopted(choice, step) if choice and type(step) is int and step >= 0 else None


@dataclass
class Noted:
    """A product that the table has no choice for. rows: of a call; element: bytes of one number."""

    rows: int
    element: int
    failed: dict[Choice, str] = field(default_factory=dict)  # why


class RunChoices:
    """In the place of a device's tuner while a run trains (`use_tuner`). table: the run's choices, by key.

    A choice of the table comes before all others. One that cannot be made on this device is named once and replaced.
    """

    def __init__(self, tuner: Tuner, device: torch.device, table: Mapping[str, Adopted]) -> None:
        self.device, self.table = device, dict(table)
        self._tuner, self._step = tuner, 0
        self._now: dict[Key, Choice] = {}  # what the step at hand uses
        self._noted: dict[Key, Noted] = {}
        self._changes_at = self._next_change()

    @property
    def name(self) -> str:
        """The kind of device, by which tables are kept apart."""
        return self._tuner.name

    @property
    def timed(self) -> bool:
        """Whether choices are timed on this kind of device: in the interpreter, on a CPU, the first is taken."""
        return self._tuner.architecture != "interpreter"

    @property
    def lacking(self) -> bool:
        """Whether a product was noted since `take_noted`."""
        return bool(self._noted)

    def begin(self, step: int) -> None:
        """Say which step is made next, counted from 1."""
        self._step = step
        if step >= self._changes_at:
            self._now.clear()
            self._changes_at = self._next_change()

    def run(
        self, product: str, dtype: torch.dtype, sizes: tuple[int, int, int], call: Callable[[Choice], T], about: str
    ) -> T:
        """`call` with the run's choice, or with the next that works."""
        key = key_of(product, dtype, sizes, about)
        while True:
            choice = self._now.get(key) or self._look_up(key, dtype.itemsize, sizes[0])
            try:
                return call(choice)
            except FAILURES as error:
                self._tuner.leave_out(key, choice, error)
                self._now.pop(key, None)
                adopted = self.table.get(str(key))
                if adopted is None or adopted.choice == choice:
                    self._note(key, sizes[0], dtype.itemsize).failed[choice] = str(error)
                    self.table.pop(str(key), None)

    def take_noted(self) -> dict[Key, Noted]:
        """What this rank lacks, for `answer` on the first rank."""
        noted, self._noted = self._noted, {}
        return noted

    def answer(self, noted: Iterable[Mapping[Key, Noted]], step: int) -> dict[str, Adopted]:
        """Choices for what the ranks noted, each key once, timed on this device; they hold from `step` on."""
        found: dict[str, Adopted] = {}
        lacking: dict[Key, Noted] = {}
        for one in noted:
            for key, lack in one.items():
                merged = lacking.setdefault(key, Noted(lack.rows, lack.element))
                merged.rows = max(merged.rows, lack.rows)
                merged.failed |= lack.failed
        for key, lack in lacking.items():
            for choice, why in lack.failed.items():
                if choice in self._tuner.candidates(key, lack.element):
                    self._tuner.leave_out(key, choice, RuntimeError(why))
            found[str(key)] = self._find(key, lack, step)
        return found

    def adopt(self, found: Mapping[str, Adopted]) -> None:
        """Take answers into the table; every rank takes the same before the same step."""
        self.table.update(found)
        self._changes_at = self._next_change()

    def _look_up(self, key: Key, element: int, rows: int) -> Choice:
        left = self._tuner.left(key, element)
        adopted = self.table.get(str(key))
        if adopted is not None and adopted.choice not in left:
            warnings.warn(
                f"{key}: the run's {adopted.choice} cannot be made on {self.name}: another one is found",
                RuntimeWarning,
                stacklevel=2,
            )
            del self.table[str(key)]
            adopted = None
        choice = self._held(key, left)
        if choice is None:
            near = nearest(key, lambda other: self._held(other, left))
            choice = self._tuner.shipped(key, left) or near or left[0]
            # Of other numbers of rows it was timed at the start: no later step makes every rank wait for that again.
            if adopted is None and near is None and self.timed:
                self._note(key, rows, element)
        self._now[key] = choice
        return choice

    def _held(self, key: Key, left: Sequence[Choice]) -> Choice | None:
        """What the table has for a key at this step, where it is among those that are left."""
        adopted = self.table.get(str(key))
        held = adopted is not None and adopted.from_step <= self._step and adopted.choice in left
        return adopted.choice if adopted is not None and held else None

    def _note(self, key: Key, rows: int, element: int) -> Noted:
        return self._noted.setdefault(key, Noted(rows, element))

    def _find(self, key: Key, lack: Noted, step: int) -> Adopted:
        left = self._tuner.left(key, lack.element)
        try:
            call = made_call(key, lack.rows, self.device)
            return Adopted(self._tuner.choose(key, lack.element, call) if call else left[0], step)
        except torch.OutOfMemoryError:
            warnings.warn(
                f"{key}: not timed, there is no memory for it beside the training: {left[0]} is used",
                RuntimeWarning,
                stacklevel=2,
            )
            return Adopted(left[0], step)

    def _next_change(self) -> float:
        return min((a.from_step for a in self.table.values() if a.from_step > self._step), default=math.inf)


def run_choices(device: torch.device, tables: Mapping[str, Mapping[str, Adopted]]) -> RunChoices:
    """The choices of a run on a device; tables: those that the run has, by kind of device."""
    tuner = device_tuner(device)
    return RunChoices(tuner, device, tables.get(tuner.name, {}))
