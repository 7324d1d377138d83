"""A training run's block sizes: one table for all ranks, which a resumed run reuses.

Two timings of one matmul may disagree, and every block size sums in another order. Nothing is timed within a step,
where ranks wait for each other. A matmul that the table lacks uses the choice that ships with the package, else the
table's choice at the nearest number of rows, else the architecture's first candidate, and is noted. So the first steps
find what the run needs, and a later step with a new number of rows times nothing. Between steps, where all ranks meet,
rank 0 times what any of them noted (`answer`), and from the next step on all of them use its answers (`adopt`). The
table records the step from which each choice holds, so that a step that is repeated after a resume is computed as
before.
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
    """A choice, and the first step that uses it."""

    choice: Choice
    from_step: int = 0

    def document(self) -> dict[str, Any]:
        """Return it as JSON values; `read_adopted` reads them."""
        return {"choice": asdict(self.choice), "from_step": self.from_step}


def read_adopted(entry: Any) -> Adopted | None:
    """Read what `Adopted.document` returned, or an entry of `tuned.json`, which holds from step 0; else return None."""
    choice = read_choice(entry)
    step = entry.get("from_step", 0) if choice else None
    return Adopted(choice, step) if choice and type(step) is int and step >= 0 else None


@dataclass
class Noted:
    """A matmul without a choice in the table. rows: of a call; element: bytes per element."""

    rows: int
    element: int
    failed: dict[Choice, str] = field(default_factory=dict)  # to the reason


class RunChoices:
    """Replaces a device's tuner while a run trains (`use_tuner`). table: the run's choices, by key.

    The table's choice takes precedence. One that this device cannot run is replaced, with one warning.
    """

    def __init__(self, tuner: Tuner, device: torch.device, table: Mapping[str, Adopted]) -> None:
        self.device, self.table = device, dict(table)
        self._tuner, self._step = tuner, 0
        self._now: dict[Key, Choice] = {}  # choices of the current step
        self._noted: dict[Key, Noted] = {}
        self._changes_at = self._next_change()

    @property
    def name(self) -> str:
        """The kind of device; each kind has its own table."""
        return self._tuner.name

    @property
    def timed(self) -> bool:
        """Whether choices are timed on this kind of device; the interpreter on a CPU takes the first."""
        return self._tuner.architecture != "interpreter"

    @property
    def lacking(self) -> bool:
        """Whether a matmul was noted since `take_noted`."""
        return bool(self._noted)

    def begin(self, step: int) -> None:
        """Set the number of the next step, counted from 1."""
        self._step = step
        if step >= self._changes_at:
            self._now.clear()
            self._changes_at = self._next_change()

    def run(
        self, product: str, dtype: torch.dtype, sizes: tuple[int, int, int], call: Callable[[Choice], T], about: str
    ) -> T:
        """Run `call` with the run's choice, or with the next that works."""
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
        """Return what this rank lacks, for `answer` on rank 0."""
        noted, self._noted = self._noted, {}
        return noted

    def answer(self, noted: Iterable[Mapping[Key, Noted]], step: int) -> dict[str, Adopted]:
        """Time choices for what the ranks noted, each key once, on this device; they hold from `step` on."""
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
        """Add answers to the table; every rank adds the same before the same step."""
        self.table.update(found)
        self._changes_at = self._next_change()

    def _look_up(self, key: Key, element: int, rows: int) -> Choice:
        left = self._tuner.left(key, element)
        adopted = self.table.get(str(key))
        if adopted is not None and adopted.choice not in left:
            warnings.warn(
                f"{key}: {self.name} cannot run this run's {adopted.choice}: another one is chosen",
                RuntimeWarning,
                stacklevel=2,
            )
            del self.table[str(key)]
            adopted = None
        choice = self._held(key, left)
        if choice is None:
            near = nearest(key, lambda other: self._held(other, left))
            choice = self._tuner.shipped(key, left) or near or left[0]
            # Timed at the start for other numbers of rows: no later step makes every rank wait for that again.
            if adopted is None and near is None and self.timed:
                self._note(key, rows, element)
        self._now[key] = choice
        return choice

    def _held(self, key: Key, left: Sequence[Choice]) -> Choice | None:
        """Return the table's choice for a key at this step, if it is among those left."""
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
                f"{key}: not timed, no memory is left beside the training: using {left[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return Adopted(left[0], step)

    def _next_change(self) -> float:
        return min((a.from_step for a in self.table.values() if a.from_step > self._step), default=math.inf)


def run_choices(device: torch.device, tables: Mapping[str, Mapping[str, Adopted]]) -> RunChoices:
    """Return a run's choices on a device; tables: those that the run has, by kind of device."""
    tuner = device_tuner(device)
    return RunChoices(tuner, device, tables.get(tuner.name, {}))
