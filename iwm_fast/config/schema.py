"""The whole configuration: its sections and the checks across them.

A key's type, unit, allowed range and meaning are written once, in its section (`sections`). The models are frozen and
reject unknown keys. A check across fields belongs to the model that holds both. Defaults come from the paper
(arXiv:2403.00504), else from I-JEPA's published ViT configurations.
"""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import Names, Section
from iwm_fast.config.encoders import ENCODERS, EncoderArchitecture, EncoderShape
from iwm_fast.config.external import ExternalActions
from iwm_fast.config.plugins import load_plugins, named_plugins
from iwm_fast.config.registry import OPTIMIZERS, SOURCES, needs_whole_tensors
from iwm_fast.config.sections.data import DataConfig
from iwm_fast.config.sections.model import ModelConfig, PredictorConfig
from iwm_fast.config.sections.records import CheckpointConfig, EvalConfig, LogConfig
from iwm_fast.config.sections.train import TrainConfig, ZeroConfig
from iwm_fast.config.sections.views import ActionsConfig, MasksConfig, ViewsConfig

__all__ = [
    "ENCODERS",
    "ActionsConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EncoderArchitecture",
    "EncoderShape",
    "EvalConfig",
    "ExternalActions",
    "LogConfig",
    "MasksConfig",
    "ModelConfig",
    "PredictorConfig",
    "TrainConfig",
    "ViewsConfig",
    "ZeroConfig",
]


class Config(Section):
    """The configuration of a run."""

    model: ModelConfig = ModelConfig()
    actions: ActionsConfig = ActionsConfig()
    views: ViewsConfig = ViewsConfig()
    masks: MasksConfig = MasksConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    plugins: Names = Field(
        (),
        description="your own modules, package.module or a path to a .py file, which every process imports before it "
        "checks the configuration; they register sources, terms, optimizers and more (docs/extend/index.md)",
    )

    @property
    def unread(self) -> str | None:
        """Why the predictor does not read what it predicts, so that no prediction is fed back; None where it does."""
        if self.model.target == "frozen":
            return "predictions are in the frozen target's space, and the predictor reads the encoder's"
        if self.model.target == "ema" and self.train.ema == (1.0, 1.0) and self.train.horizon == 1:
            return "train.ema [1.0, 1.0] kept the target's first weights, and the predictor reads the encoder's"
        return None

    @model_validator(mode="before")
    @classmethod
    def _plugins_first(cls, values: Any) -> Any:
        """Import the plugins: what they register are values of other keys."""
        if isinstance(values, dict):
            load_plugins(named_plugins(values.get("plugins")))
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        external = self.actions.is_external
        if self.masks.visible_blocks == self.masks.target_blocks and not external:
            raise ValueError(
                f"masks.visible_blocks is {self.masks.visible_blocks}; it must be below masks.target_blocks, unless "
                "actions.groups is [external]"
            )
        if self.views.sources_per_target > 1 and external:
            raise ValueError(
                "views.sources_per_target must be 1 where actions.groups is [external]: a triplet has one source"
            )
        if self.model.history > 1 and not external:
            raise ValueError(
                f"model.history is {self.model.history}; it must be 1 unless actions.groups is [external]: the views "
                "of one image have no earlier frames"
            )
        self._require_steps_ahead()
        if self.data.source == "triplets" and not external:
            raise ValueError("data.source is triplets, so actions.groups must be [external]")
        if (self.data.source == "folder" or SOURCES.own(self.data.source)) and external:
            raise ValueError("actions.groups is [external], so data.source must be triplets or auto")
        if self.model.predictor.kind == "mlp" and (self.actions.geometric or external):
            raise ValueError(
                "model.predictor.kind mlp sees one patch at a time and cannot move content between patches: "
                "actions.groups must be [photometric] or [photometric, compression], or use kind vit"
            )
        if self.train.activation_checkpointing and self.train.precision == "bf16" and self.zero.stage == 0:
            raise ValueError(
                "train.activation_checkpointing in bf16 needs zero.stage 1, 2 or 3: stage 0 rounds its fp32 "
                "weights to bf16 in the forward pass only, and recomputation would read the fp32 ones"
            )
        if self.train.cuda_graph and self.model.attention in ("sdpa", "cudnn"):
            raise ValueError(
                f"train.cuda_graph needs packed attention: model.attention {self.model.attention} launches one kernel "
                "per sequence length, so every batch launches others; use auto"
            )
        for key in ("compile", "target_stream", "cuda_graph"):
            if getattr(self.train, key) and self.zero.stage == 3:
                raise ValueError(
                    f"train.{key} needs zero.stage 0, 1 or 2: stage 3 all-gathers the parameters of one module at a "
                    "time, when its forward pass begins"
                )
        if self.data.wait_s >= self.train.rank_timeout_s:
            raise ValueError(
                f"data.wait_s is {self.data.wait_s:g}; it must be below train.rank_timeout_s "
                f"({self.train.rank_timeout_s:g}), or a rank that waits for data counts as hung"
            )
        if self.eval.interval_key is not None and self.eval.root is None:
            raise ValueError(
                f"eval.{self.eval.interval_key} is set and eval.root is not; set eval.root to the images to evaluate on"
            )
        _require_statistics(self.model, self.train.global_batch, self.masks.min_context)
        _require_context(self.masks, self.model.grid**2)
        return self

    def _require_steps_ahead(self) -> None:
        """Raise ValueError where predictions cannot be fed back."""
        asked = f"train.horizon is {self.train.horizon}; it must be 1 "
        if self.train.horizon == 1:
            return
        if not self.actions.is_external:
            raise ValueError(f"{asked}unless actions.groups is [external]: an image has no next one")
        if self.model.target == "frozen":
            raise ValueError(f"{asked}where model.target is frozen: {self.unread}")
        if self.train.static_shapes:
            raise ValueError(
                f"{asked}with train.static_shapes: episodes end at different steps, so that the shapes of later steps "
                "do not recur; set train.static_shapes (and train.cuda_graph) to false"
            )

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        own = OPTIMIZERS.own(self.train.optimizer)
        if own is not None and self.zero.stage == 3:
            raise ValueError(
                f"train.optimizer {self.train.optimizer} needs zero.stage 0, 1 or 2: at stage 3 DeepSpeed updates one "
                "module's shards at a time, with adamw"
            )
        if needs_whole_tensors(self.train.optimizer) and self.zero.stage:
            raise ValueError(
                f"train.optimizer {self.train.optimizer} needs whole tensors, which zero.stage {self.zero.stage} "
                "shards over ranks; use zero.stage 0, or adamw"
            )
        return self


def _require_context(masks: MasksConfig, patches: int) -> None:
    """Raise ValueError where no context of ``patches`` could have the fewest, so that each would be the fallback's."""
    if masks.min_context >= patches:
        raise ValueError(f"masks.min_context is {masks.min_context}; a view has only {patches} patches")
    most = max(1, round(math.sqrt(masks.context_scale[1] * patches))) ** 2
    if most < masks.min_context:
        raise ValueError(
            f"masks.context_scale ends at {masks.context_scale[1]:g}, {most} of {patches} patches, below "
            f"masks.min_context ({masks.min_context}): raise the one, or lower the other"
        )


def _require_statistics(model: ModelConfig, images: int, tokens: int) -> None:
    """ValueError where the regulariser would be a statistic of a single row. tokens: fewest of an image."""
    options = model.regularizer
    rows = images * (tokens if options.on == "tokens" else 1)
    if options.kind != "none" and rows < 2:
        raise ValueError(
            f"model.regularizer.kind {options.kind} is a statistic of all {options.on} of a step, and there may be one "
            "alone: raise train.global_batch"
        )
