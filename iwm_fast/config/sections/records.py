"""Keys of what a training writes and measures besides: metrics, checkpoints, evaluation."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from iwm_fast.config.base import (
    Count,
    Place,
    Positive,
    Probability,
    Section,
)

__all__ = ["CheckpointConfig", "EvalConfig", "LogConfig"]


class LogConfig(Section):
    """What is written while training."""

    every_steps: Count = Field(10, description="a line of metrics every so many steps")
    tensorboard: bool = Field(True, description="also write RUN/tensorboard")
    wandb: str | None = Field(None, description="also log to this project of Weights & Biases; default: none")
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="also serve the newest record to Prometheus under this port, 0 a free one; default: none"
    )
    prometheus_host: str = Field("127.0.0.1", description="address that the port is opened on; default: this host only")
    straggler_ratio: Annotated[float, Field(gt=1.0)] = Field(
        1.25, description="a rank is named whose own time stays above this ratio of the median of the others'"
    )
    rank_me_floor: Probability = Field(
        0.05, description="warn of collapse when RankMe of the target falls under this share of the width"
    )


class CheckpointConfig(Section):
    """When the state is written, and how much of it is kept."""

    alternatives: ClassVar = (("every_steps", "every_epochs"),)

    every_steps: Count = Field(1000, description="a checkpoint every so many steps, and at the end")
    every_epochs: Positive | None = Field(
        None, description="a checkpoint every so many passes over the data, instead of every_steps; default: none"
    )
    keep_last: Count = Field(3, description="checkpoints kept; older ones are removed")
    keep_every: Count | None = Field(
        None, description="checkpoints whose step is a multiple of this are never removed; default: none"
    )


class EvalConfig(Section):
    """Evaluation while training."""

    alternatives: ClassVar = (("every_steps", "every_epochs"),)

    every_steps: Count | None = Field(None, description="k-NN and MRR every so many steps; default: never")
    every_epochs: Positive | None = Field(
        None, description="k-NN and MRR every so many passes over the data, instead of every_steps; default: none"
    )
    root: Place | None = Field(
        None, description="folder with train/ and test/ (or val/), or with a folder a class (docs/guides/data.md)"
    )
    images: Count = Field(2000, description="most images used for k-NN while training, of each split")
    mrr_images: Count = Field(32, description="images whose banks are ranked while training")
    bank: Annotated[int, Field(ge=2)] = Field(
        256, description="actions, and so transformed targets, in a bank; of triplets: next frames"
    )
    horizon: Count = Field(8, description="steps of a roll-out, on triplets")

    @property
    def interval_key(self) -> str | None:
        """The key that asks for evaluation while training, None where none does."""
        return next((name for name in ("every_steps", "every_epochs") if getattr(self, name) is not None), None)
