"""The engine's own training step without a run directory: what is timed is what trains."""

from __future__ import annotations

from typing import cast

from iwm_fast.actions.transforms import ActionSpace
from iwm_fast.config import Config
from iwm_fast.data.loader import TrainingStream
from iwm_fast.engine.build import trained_model
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.step import Trainer
from iwm_fast.engine.zero import initialize
from iwm_fast.measure.synthetic import BatchStream

__all__ = ["MANY_STEPS", "prepare_trainer"]

# Longer than any measurement: the schedules do not end in it, and no step is the last, which would be logged.
MANY_STEPS = 1_000_000


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
