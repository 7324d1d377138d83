"""The training step and the loop around it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.batch import Batch
from iwm_fast.data.loader import TrainingStream
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.distributed.stragglers import OwnTime, over_ranks
from iwm_fast.engine.distributed.watchdog import Liveness
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.metrics.collapse import rank_me, spread
from iwm_fast.engine.metrics.energy import energy_shares
from iwm_fast.engine.metrics.log import memory_bytes
from iwm_fast.engine.metrics.throughput import StepCounter
from iwm_fast.engine.micro_batch import Packer
from iwm_fast.engine.nonfinite import SkippedSteps
from iwm_fast.engine.optimizer import set_hyperparameters
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.models.iwm import IWMOutput

__all__ = ["Spans", "Trainer"]


@dataclass
class Spans:
    """Host seconds of one step by part; on a GPU the parts are asynchronous and only ``step`` is meaningful."""

    parts: dict[str, float] = field(default_factory=dict)
    # Called with the name of each part as it begins.
    note: Callable[[str], None] = lambda _part: None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Any:
        """Time a part, name it in traces, and tell the other ranks."""
        self.note(name)
        with torch.profiler.record_function(f"iwm/{name}"):
            begin = time.perf_counter()
            yield
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - begin


class Trainer:
    """The state of a training. ``step`` counts the steps done; all ranks call the same methods."""

    def __init__(
        self, config: Config, zero: ZeroEngine, average: TargetAverage | None, stream: TrainingStream,
        schedules: Schedules, ranks: Ranks, *, predicts: str, action_dim: int, dataset_size: int,
        step: int, updates: int, live: Liveness | None = None, skipped: SkippedSteps | None = None,
    ) -> None:  # fmt: skip
        self.config, self.zero, self.average, self.stream = config, zero, average, stream
        self.schedules, self.ranks, self.predicts, self.dataset_size = schedules, ranks, predicts, dataset_size
        self.packer = Packer(config, stream.micro_batch, predicts, ranks.device, ranks.world)
        self.step, self.updates, self.live = step, updates, live
        self.skipped = skipped or SkippedSteps(config.train.max_skipped, None, ranks)
        self.new_spans: Callable[[], Spans] = Spans  # a profile replaces it
        # Around the wait for a batch; an exception there leaves the state after the previous step.
        self.waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.counter = StepCounter(config, action_dim, ranks.device)
        self._own = OwnTime(ranks.device)
        self._batches = iter(stream)
        self._mark = time.perf_counter()

    def train_step(self) -> dict[str, Any] | None:
        """Take one optimizer step over the global batch; return the record where this step is logged."""
        spans, number = self.new_spans(), self.step + 1
        if (live := self.live) is not None:
            spans.note = lambda part: live.at(f"{part} of step {number}")
        lr, decay = self.schedules.lr(self.step), self.schedules.weight_decay(self.step)
        set_hyperparameters(self.zero.optimizer, lr, decay)
        totals = torch.zeros(len(self.packer.objective.terms), dtype=torch.float32, device=self.ranks.device)
        ids: list[int] = []
        epochs: list[int] = []
        for _ in range(self.stream.accumulation):
            with spans("data"), self._own.waiting(), self.waiting():
                batch = next(self._batches)
                ids += batch.ids.tolist()
                epochs += batch.epochs.tolist()
            with spans("forward"), self._own.computing():
                output = self._forward(batch)
                totals += output.terms
            with spans("backward"):
                # The terms have their factors: the gradient that comes in is 1, and stopgrad_l2 wrote its own for that.
                self.zero.engine.backward(output.loss, scale_wrt_gas=False)
            with spans("optimizer"):
                self.zero.engine.step()
        self.step += 1
        found_inf = self.zero.found_inf
        self.skipped.note(found_inf, self.step, epochs, ids)
        if self.average is not None:
            with spans("ema"):
                self.average.update(self.schedules.ema(self.step - 1), unless=found_inf)
        logged = self.step % self.config.log.every_steps == 0 or self.step == 1 or self._last_step
        losses = self._global_losses(totals) if logged else None  # waits for the device: the step's work ends here
        now = time.perf_counter()
        self.counter.add(now - self._mark, spans.parts)
        self._mark = now
        if losses is None:
            return None
        self.settle()
        record = self._record(losses, lr, decay, output)
        record["diagnostics_s"] = time.perf_counter() - now
        self.restart_clock()
        return record

    def settle(self) -> None:
        """Read which steps since the last logged one were skipped; the host waits for the device.

        Raises UserError on every rank where too many were skipped in a row.
        """
        self.updates += self.skipped.read()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (a checkpoint, an evaluation, RankMe) from the step's time."""
        self._mark = time.perf_counter()

    @property
    def _last_step(self) -> bool:
        return self.step == (self.config.train.steps or self.schedules.total)

    def _forward(self, batch: Batch) -> Any:
        """The model's output for a micro-batch."""
        packed = self.packer(batch, self.step)
        lengths = batch.patches.context_lengths, batch.patches.target_lengths
        self.counter.count(*lengths, packed.padding, batch.steps)
        return self.zero.engine(*packed.arguments)

    def _global_losses(self, totals: Tensor) -> list[float]:
        """Each term over the global batch; all ranks call it."""
        if self.ranks.world > 1:
            dist.all_reduce(totals)
            totals = totals / self.ranks.world
        values: list[float] = totals.tolist()
        return values

    def _record(self, losses: list[float], lr: float, decay: float, output: IWMOutput) -> dict[str, Any]:
        features = output.target_features
        images = self.config.train.global_batch
        timing = self._timing(images)
        return {
            "step": self.step,
            "epoch": self.step * images / self.dataset_size,
            "samples_seen": self.step * images,
            **self.packer.objective.logged(losses),
            "lr": lr,
            "weight_decay": decay,
            "ema_momentum": self.schedules.ema(self.step - 1) if self.average is not None else None,
            "grad_norm": self.zero.grad_norm,
            **timing,
            "rank_me": rank_me(features),
            "target_spread": spread(features),
            **energy_shares(features, output.target_places, self.config.model.grid**2),
            "skipped_in_a_row": self.skipped.in_a_row,
        }

    def _timing(self, images: int) -> dict[str, Any]:
        """Timing over all ranks: means, the largest where one makes all wait, and who took how long."""
        steps = self.counter.steps
        mine = self.counter.take(images)
        own = self._own.take(steps)
        memory, bad = memory_bytes(self.ranks.device), self.stream.bad
        found = over_ranks(mine | {"own_s": own, "memory_bytes": memory, "bad_samples": bad}, self.ranks)
        means = {key: None if mine[key] is None else statistics.fmean(found[key]) for key in mine}
        return means | {
            "step_s_max": max(found["step_s"]),
            "data_wait_s_max": max(found["data_wait_s"]),
            "own_s": statistics.fmean(found["own_s"]),
            "own_s_max": max(found["own_s"]),
            "slowest_rank": found["own_s"].index(max(found["own_s"])),
            "own_s_by_rank": found["own_s"],
            "memory_bytes": int(max(found["memory_bytes"])),
            "bad_samples": int(sum(found["bad_samples"])),
            **({"token_sizes": len(self.packer.sizes)} if self.config.train.static_shapes else {}),
        }
