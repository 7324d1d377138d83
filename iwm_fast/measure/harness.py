"""The engine's own training step without a run directory: what is timed is what trains."""

from __future__ import annotations

from typing import cast

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
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

# Longer than any measurement: the schedules do not end in it, and no step is the last, which would be logged.
MANY_STEPS = 1_000_000
# Batches of other lengths may meet kernels that were not compiled yet: this many steps in a row have to compile none.
_QUIET_STEPS, _LONGEST_WARM_UP = 4, 60


def prepare_trainer(
    config: Config, space: ActionSpace, stream: BatchStream | TrainingStream, ranks: Ranks, images: int = 1_000_000
) -> Trainer:
    """Model, DeepSpeed engine, moving average and loop as `pretrain` builds them, fed by `stream`.

    `images`: of an epoch, for the record's "epoch" only.
    """
    model = trained_model(config, space.dim, ranks.device)
    zero = initialize(model, config, stream.micro_batch, stream.accumulation)
    average = TargetAverage(zero, ranks) if config.model.target == "ema" else None
    return Trainer(
        config, zero, average, cast(TrainingStream, stream), Schedules(config.train, MANY_STEPS), ranks,
        predicts=model.predicts, action_dim=space.dim, dataset_size=images, step=0, updates=0,
    )  # fmt: skip


def settle(trainer: Trainer, least: int) -> int:
    """Train until the last of at least `least` steps have compiled nothing; how many steps that took."""
    quiet = 0
    if trainer.config.train.cuda_graph:
        # A size is captured when it comes again after nothing was compiled: in the third round at the latest.
        least = max(least, 3 * BATCHES)
    for step in range(1, least + _LONGEST_WARM_UP + 1):
        before = _made(trainer)
        trainer.train_step()
        quiet = quiet + 1 if _made(trainer) == before else 0
        if step >= least and quiet >= min(step, _QUIET_STEPS):
            return step
    return least + _LONGEST_WARM_UP


def _made(trainer: Trainer) -> int:
    """Kernels and regions compiled, and graphs captured."""
    graphed = trainer.zero.graphed
    return compiled_variants() + compilations() + (graphed.captures if graphed else 0)
