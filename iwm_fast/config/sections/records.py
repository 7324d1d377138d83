"""Keys of logging, checkpoints and evaluation."""

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
    """What training logs, and how often."""

    every_steps: Count = Field(10, description="steps between lines of metrics")
    tensorboard: bool = Field(True, description="also write RUN/tensorboard")
    wandb: str | None = Field(None, description="also log to this Weights & Biases project; default: none")
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="also serve the newest metrics to Prometheus on this port; 0: a free port; default: none"
    )
    prometheus_host: str = Field(
        "127.0.0.1", description="address to listen on for Prometheus; default: this host only"
    )
    straggler_ratio: Annotated[float, Field(gt=1.0)] = Field(
        1.25, description="name a rank whose own time stays above this multiple of the other ranks' median"
    )
    rank_me_floor: Probability = Field(
        0.05, description="warn of collapse when RankMe of the target falls under this share of the width"
    )


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    alternatives: ClassVar = (("every_steps", "every_epochs"),)

    every_steps: Count = Field(1000, description="steps between checkpoints; one is also written at the end")
    every_epochs: Positive | None = Field(
        None, description="epochs between checkpoints, instead of every_steps; default: none"
    )
    keep_last: Count = Field(3, description="newest checkpoints to keep; older ones are removed")
    keep_every: Count | None = Field(
        None, description="never remove a checkpoint whose step is a multiple of this; default: none"
    )


class EvalConfig(Section):
    """Evaluation while training."""

    alternatives: ClassVar = (("every_steps", "every_epochs"),)

    every_steps: Count | None = Field(None, description="steps between evaluations (k-NN and MRR); default: never")
    every_epochs: Positive | None = Field(
        None, description="epochs between evaluations, instead of every_steps; default: none"
    )
    root: Place | None = Field(
        None,
        description="images to evaluate on: train/ and test/ (or val/), or one folder per class (docs/guides/data.md)",
    )
    images: Count = Field(2000, description="most images of each split for k-NN while training")
    mrr_images: Count = Field(32, description="query images of MRR while training")
    bank: Annotated[int, Field(ge=2)] = Field(
        256, description="candidates in a bank of MRR: transformed targets, one per action; of triplets: next frames"
    )
    horizon: Count = Field(8, description="steps of a rollout, on triplets")

    @property
    def interval_key(self) -> str | None:
        """The key that turns on evaluation while training, or None."""
        return next((name for name in ("every_steps", "every_epochs") if getattr(self, name) is not None), None)
