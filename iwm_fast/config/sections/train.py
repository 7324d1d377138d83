"""Keys of optimisation, and of what ZeRO shards over the ranks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import (
    Count,
    NonNegative,
    Positive,
    Probability,
    Range,
    Section,
    require_ascending,
)
from iwm_fast.config.registry import OptimizerName

__all__ = ["TrainConfig", "ZeroConfig"]


class TrainConfig(Section):
    """Optimisation."""

    alternatives: ClassVar = (("warmup", "warmup_epochs", "warmup_ratio"),)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of weights, data order, augmentations and masks"
    )
    epochs: Annotated[Positive, Field(le=1e12)] = Field(300.0, description="length of training in passes over the data")
    steps: Count | None = Field(None, description="stop after this step; default: at the end of the schedules")
    schedule_steps: Count | None = Field(None, description="length of the schedules in steps; default: from epochs")
    global_batch: Count = Field(2048, description="images per step, over all ranks and accumulated micro-batches")
    micro_batch: Count | None = Field(None, description="most images per forward pass of a rank; default: no limit")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of activations; master weights are always fp32")
    optimizer: OptimizerName = Field(
        "adamw",
        description="muon orthogonalises the updates of matrices, and is AdamW for the rest; lamb scales each tensor's "
        "update by its norm, for large batches; both need zero.stage 0; or an optimizer that a plugin registers",
    )
    horizon: Annotated[int, Field(ge=1, le=16)] = Field(
        1,
        description="steps that the predictor predicts, each prediction fed back with gradient: above 1 for recorded "
        "actions only, whose manifest has episodes; then all patches are predicted",
    )
    lr: Positive = Field(1e-3, description="peak learning rate, at a global batch of lr_batch")
    lr_batch: Count | None = Field(None, description="scale lr by global_batch / lr_batch; default: no scaling")
    lr_start: NonNegative = Field(0.2, description="learning rate at step 0, over the peak (I-JEPA: 2e-4 / 1e-3)")
    lr_final: NonNegative = Field(1e-3, description="learning rate at the end, over the peak (I-JEPA: 1e-6 / 1e-3)")
    weight_decay: Range = Field((0.04, 0.4), description="cosine from first to last; not for biases, norms and tokens")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up of the learning rate")
    warmup_epochs: NonNegative | None = Field(
        None, description="warm-up in passes over the data, instead of warmup; default: none"
    )
    warmup_ratio: Probability | None = Field(
        None, description="warm-up as a fraction of the schedules' steps, instead of warmup; default: none"
    )
    ema: Range = Field((0.996, 1.0), description="momentum of the target encoder, cosine from first to last")
    betas: Range = Field((0.9, 0.999), description="AdamW's decay rates of its two moments")
    clip: NonNegative = Field(0.0, description="clip gradients to this global norm; 0: never")
    activation_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    compile: bool = Field(
        False,
        description="compile the code between attention calls with torch.compile, which takes seconds to minutes at "
        "the first step; new lengths do not recompile; a CPU needs a C++ compiler; not with zero.stage 3",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, use only operators that give the same bits in every run (slower, above all attention's "
        "backward pass); a CPU always does. Not with model.attention cudnn",
    )
    target_stream: bool = Field(
        False,
        description="on a GPU, compute the target on its own CUDA stream, concurrently with the context; not with "
        "zero.stage 3",
    )
    static_shapes: bool = Field(
        False,
        description="pad a micro-batch's tokens to a multiple of static_multiple, so that shapes recur; padding has no "
        "loss and no gradient",
    )
    static_multiple: Count | None = Field(
        None,
        description="with static_shapes: tokens; default: the largest power of two up to 1/48 of a micro-batch's "
        "patches",
    )
    cuda_graph: bool = Field(
        False,
        description="on a GPU, with static_shapes: capture a micro-batch's forward and backward pass as one CUDA graph "
        "per recurring size; not with target_stream or zero.stage 3",
    )
    max_skipped: Annotated[int, Field(ge=0)] = Field(
        10,
        description="consecutive steps with a non-finite loss or gradient to skip before the run stops; checked when a "
        "step is logged or a checkpoint is written",
    )
    rank_timeout_s: Annotated[float, Field(ge=1.0)] = Field(
        600.0, description="seconds without progress after which a rank counts as hung and all ranks stop"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        require_ascending("ema", self.ema, 0.0, 1.0)
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; each must be in [0, 1)")
        if min(self.weight_decay) < 0:
            raise ValueError(f"weight_decay is {list(self.weight_decay)}; each must be 0 or more")
        if self.static_multiple is not None and not self.static_shapes:
            raise ValueError(f"static_multiple is {self.static_multiple}, which needs static_shapes: true")
        if self.cuda_graph and not self.static_shapes:
            raise ValueError("cuda_graph needs static_shapes: true, because a graph has fixed shapes")
        if self.cuda_graph and self.target_stream:
            raise ValueError("cuda_graph and target_stream exclude each other: a graph is captured on one stream")
        return self


class ZeroConfig(Section):
    """What DeepSpeed's ZeRO shards over the ranks."""

    stage: Literal[0, 1, 2, 3] = Field(
        1, description="what to shard over ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters"
    )
    hpz_partition_size: Count = Field(
        1,
        description="with zero.stage 3: consecutive ranks of one host that hold a copy of the parameters together, so "
        "that a step gathers them over the network once and then within the host (ZeRO++); 1: no copy",
    )

    @model_validator(mode="after")
    def _parameters_are_sharded(self) -> Self:
        if self.hpz_partition_size > 1 and self.stage != 3:
            raise ValueError(
                f"hpz_partition_size is {self.hpz_partition_size}, which needs stage 3, which shards parameters; "
                f"stage is {self.stage}: give 1, or stage 3"
            )
        return self
