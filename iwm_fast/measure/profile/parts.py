"""The step in parts that do not overlap: whoever is entered last gets the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from iwm_fast.engine.step import Spans, Trainer
from iwm_fast.measure.collective_time import CollectiveTime

__all__ = ["PARTS", "PartsClock", "measured_parts"]

# In the order of a step. What is in none of them is the loop's own work: schedules, counters, moving batches.
PARTS = (
    "data wait", "forward target", "forward context", "predictor", "loss", "backward", "optimizer", "EMA",
    "communication",
)  # fmt: skip
_OF_SPANS = {"data": "data wait", "forward": "loss", "backward": "backward", "optimizer": "optimizer", "ema": "EMA"}


class PartsClock:
    """Seconds of each step by part. On a GPU the device is waited for at each border, so that its work is there too.

    steps: seconds by part of each step; totals: of each whole step, by a clock of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[dict[str, float]] = []
        self.totals: list[float] = []
        self._device, self._stack, self._mark = device, [""], 0.0
        self._now: dict[str, float] = {}

    def enter(self, part: str) -> None:
        """What follows belongs to `part`, until it is left."""
        self._account()
        self._stack.append(part)

    def leave(self) -> None:
        """What follows belongs to the part that was interrupted."""
        self._account()
        self._stack.pop()

    def _account(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._now[self._stack[-1]] = self._now.get(self._stack[-1], 0.0) + now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step; its time outside of every part is under the empty name."""
        begin = time.perf_counter()
        self._now, self._mark = {}, time.perf_counter()
        yield
        self._account()
        self.steps.append(self._now)
        self.totals.append(time.perf_counter() - begin)

    def middle(self) -> tuple[dict[str, float], float]:
        """Parts and whole of the step that took the median time: one real step, whose parts add up."""
        order = sorted(range(len(self.totals)), key=self.totals.__getitem__)
        chosen = order[len(order) // 2]
        return self.steps[chosen], self.totals[chosen]


class _ClockedSpans(Spans):
    """The loop's spans, each a part."""

    def __init__(self, clock: PartsClock) -> None:
        super().__init__()
        self._clock = clock

    @contextlib.contextmanager
    def __call__(self, name: str) -> Any:
        """Time a part."""
        self._clock.enter(_OF_SPANS[name])
        yield
        self._clock.leave()


@contextlib.contextmanager
def measured_parts(trainer: Trainer, said: CollectiveTime) -> Iterator[PartsClock]:
    """A clock that the trainer's steps and collectives run against while inside."""
    clock = PartsClock(trainer.ranks.device)
    before = trainer.new_spans
    trainer.new_spans = lambda: _ClockedSpans(clock)
    said.entered, said.left = (lambda: clock.enter("communication")), clock.leave
    hooks = []
    for part, module in _modules(trainer.zero.module):

        def entered(_: nn.Module, given: tuple[Any, ...], part: str = part) -> None:
            # A shared target's encoder runs twice: on visible patches, and for the target on whole images.
            whole = part == "forward context" and len(given) == 1
            clock.enter("forward target" if whole else part)

        hooks.append(module.register_forward_pre_hook(entered))
        hooks.append(module.register_forward_hook(lambda *_: clock.leave()))
    try:
        yield clock
    finally:
        trainer.new_spans, said.entered, said.left = before, (lambda: None), (lambda: None)
        for hook in hooks:
            hook.remove()


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    names = {"forward target": "target_encoder", "forward context": "encoder", "predictor": "predictor"}
    for part, name in names.items():
        module = getattr(model, name)
        if module is not None:
            yield part, module
