"""The engine's training step without a run directory, for measurements."""

from __future__ import annotations

from typing import cast

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.config.hosts import require_within_hosts
from iwm_fast.data.loader import TrainingStream
from iwm_fast.engine.build import trained_model
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.step import Trainer
from iwm_fast.engine.zero import initialize
from iwm_fast.kernels import compiled_variants
from iwm_fast.measure.batches import BATCHES
from iwm_fast.measure.synthetic import BatchStream
from iwm_fast.models.compiled_regions import compilations

__all__ = ["MANY_STEPS", "prepare_trainer", "settle"]

# Longer than any measurement, so no schedule ends and no step is the last, which would be logged.
MANY_STEPS = 1_000_000
# New lengths may need kernels that are not compiled yet: this many steps in a row must compile none.
_QUIET_STEPS, _LONGEST_WARM_UP = 4, 60


def prepare_trainer(
    config: Config, space: ActionSpace, stream: BatchStream | TrainingStream, ranks: Ranks, images: int = 1_000_000
) -> Trainer:
    """Build model, DeepSpeed engine, EMA and trainer as `pretrain` does, on batches of `stream`.

    `images`: per epoch, for the record's "epoch" only.
    """
    require_within_hosts(config.zero.hpz_partition_size, [info.host for info in ranks.infos])
    model = trained_model(config, space.dim, ranks.device)
    zero = initialize(model, config, stream.micro_batch, stream.accumulation)
    average = TargetAverage(zero, ranks) if config.model.target == "ema" else None
    return Trainer(
        config, zero, average, cast(TrainingStream, stream), Schedules(config.train, MANY_STEPS), ranks,
        predicts=model.predicts, action_dim=space.dim, dataset_size=images, step=0, updates=0,
    )  # fmt: skip


def settle(trainer: Trainer, least: int) -> int:
    """Train at least `least` steps, until the last ones compile nothing. Return their number."""
    quiet = 0
    if trainer.config.train.cuda_graph:
        # A size is captured when it recurs after nothing was compiled: in the third round at the latest.
        least = max(least, 3 * BATCHES)
    for step in range(1, least + _LONGEST_WARM_UP + 1):
        before = _compiled(trainer)
        trainer.train_step()
        quiet = quiet + 1 if _compiled(trainer) == before else 0
        if step >= least and quiet >= min(step, _QUIET_STEPS):
            return step
    return least + _LONGEST_WARM_UP


def _compiled(trainer: Trainer) -> int:
    """Return the number of kernels and regions compiled, and of graphs captured."""
    graphed = trainer.zero.graphed
    return compiled_variants() + compilations() + (graphed.captures if graphed else 0)
