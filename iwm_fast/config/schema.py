"""Every key of a configuration: its type, unit, allowed range and meaning stand here and nowhere else.

The models are frozen and refuse unknown keys. Checks across fields stand in the model that holds both fields.
Sources of defaults: the paper (arXiv:2403.00504) and, where it is silent, I-JEPA's published ViT configurations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from iwm_fast.config.base import Count, NonNegative, Probability, Range, Section, pair, require_ascending
from iwm_fast.config.encoders import ENCODERS, EncoderShape
from iwm_fast.config.external import EXTERNAL, ExternalActions, still
from iwm_fast.config.sections.data import DataConfig
from iwm_fast.config.sections.model import ModelConfig, PredictorConfig
from iwm_fast.config.sections.records import CheckpointConfig, EvalConfig, LogConfig
from iwm_fast.config.sections.train import TrainConfig, ZeroConfig

__all__ = [
    "ENCODERS",
    "ActionsConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
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


class ActionsConfig(Section):
    """What is done to a view, how often and how strongly, and which of it the predictor is told."""

    groups: Annotated[tuple[Literal["photometric", "geometric", "external"], ...], BeforeValidator(pair)] = Field(
        ("photometric",),
        description="photometric, or photometric and geometric; or external: the actions of a manifest of triplets, "
        "and nothing else is done to the pictures unless crop_scale or flip_probability, for both alike, are given",
    )
    external: ExternalActions | None = Field(
        None, description="what the external actions are; default: as the manifest says, and recorded here by the run"
    )
    strength: NonNegative = Field(1.0, description="multiplies the four jitter strengths; 2 strong, 3 very strong")
    form: Literal["difference", "absolute"] = Field(
        "difference", description="jitter told as target minus source (paper), or as both views' own values"
    )
    jitter_probability: Probability = Field(0.8, description="chance of colour jitter, for each view by itself")
    brightness: NonNegative = Field(0.4, description="factor drawn from 1 ± this, clipped at 0")
    contrast: NonNegative = Field(0.4, description="factor drawn from 1 ± this, clipped at 0")
    saturation: NonNegative = Field(0.2, description="factor drawn from 1 ± this, clipped at 0")
    hue: NonNegative = Field(0.1, description="in turns: 0.1 is ± 36 degrees of rotation in YIQ; at most half a turn")
    grayscale_probability: Probability = Field(0.2, description="chance that the source loses its colour")
    blur_probability: Probability = Field(0.2, description="chance that the source is blurred")
    blur_sigma: Range = Field((0.1, 2.0), description="pixels, drawn uniformly")
    solarize_probability: Probability = Field(0.1, description="chance that the source is solarized")
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = Field(128, description="levels at or above are inverted")
    crop_scale: Range = Field((0.3, 1.0), description="share of the image's area")
    crop_aspect: Range = Field((0.75, 4 / 3), description="width over height, drawn log-uniformly")
    flip_probability: Probability = Field(0.5, description="chance of a horizontal flip")
    rotation_probability: Probability = Field(
        0.75, description="geometric group only: chance of one, two or three quarter turns of the source"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        require_ascending("blur_sigma", self.blur_sigma, 0.01, 20.0)
        require_ascending("crop_scale", self.crop_scale, 0.01, 1.0)
        require_ascending("crop_aspect", self.crop_aspect, 0.1, 10.0)
        if self.groups not in (("photometric",), ("photometric", "geometric"), EXTERNAL):
            raise ValueError(
                f"groups is {list(self.groups)}; it must be [photometric], [photometric, geometric] or [external]"
            )
        _, untold = still(type(self).model_fields)
        done = [name for name in untold if self.is_external and getattr(self, name) > 0]
        if done:
            raise ValueError(f"{done[0]} is {getattr(self, done[0]):g}; it must be 0 where groups is [external]")
        if self.external is not None and not self.is_external:
            raise ValueError(f"external is given, so groups must be [external]; it is {list(self.groups)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _pairs_stay_as_they_are(cls, values: Any) -> Any:
        if isinstance(values, dict) and pair(values.get("groups")) == EXTERNAL:
            return {**still(cls.model_fields)[0], **values}
        return values

    @property
    def is_external(self) -> bool:
        """Whether the actions are somebody else's, of a manifest of triplets."""
        return self.groups == EXTERNAL

    @property
    def geometric(self) -> bool:
        """Whether the source has a geometry of its own, of which the predictor is told."""
        return "geometric" in self.groups


class ViewsConfig(Section):
    """How many views are made of an image."""

    sources_per_target: Count = Field(
        1, description="source views of one decoded image, each with its own action and mask, for one target (paper: 1)"
    )


class MasksConfig(Section):
    """Multi-block masks (I-JEPA, section 3): what the encoder does not see and the predictor answers for."""

    target_blocks: Count = Field(4, description="blocks an image; the predictor answers for their union")
    visible_blocks: Annotated[int, Field(ge=0)] = Field(
        0,
        description="of the target blocks, those that the encoder sees all the same: there the predictor answers for "
        "the action alone; below target_blocks, or all of them where the actions are external",
    )
    target_scale: Range = Field((0.15, 0.2), description="share of the patches in one target block")
    target_aspect: Range = Field((0.75, 1.5), description="height over width of a target block")
    context_scale: Range = Field((0.85, 1.0), description="share of the patches in the square context block")
    min_context: Count = Field(10, description="fewest patches that the encoder sees; drawn again below it")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        require_ascending("target_scale", self.target_scale, 0.001, 1.0)
        require_ascending("target_aspect", self.target_aspect, 0.1, 10.0)
        require_ascending("context_scale", self.context_scale, 0.001, 1.0)
        if self.visible_blocks > self.target_blocks:
            raise ValueError(f"visible_blocks is {self.visible_blocks}; it must not be above {self.target_blocks}")
        return self


class Config(Section):
    """A run, whole."""

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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        external = self.actions.is_external
        if self.masks.visible_blocks == self.masks.target_blocks and not external:
            raise ValueError(
                f"masks.visible_blocks is {self.masks.visible_blocks}; it must be below masks.target_blocks, but for "
                "external actions"
            )
        if self.views.sources_per_target > 1 and external:
            raise ValueError("views.sources_per_target must be 1 where actions.groups is [external]: a triplet has one")
        if self.data.source == "triplets" and not external:
            raise ValueError("data.source is triplets, so actions.groups must be [external]")
        if self.data.source == "folder" and external:
            raise ValueError("actions.groups is [external], so data.source must be triplets or auto")
        if self.model.predictor.kind == "mlp" and self.actions.groups != ("photometric",):
            raise ValueError(
                "model.predictor.kind mlp cannot look elsewhere than at a patch's own place: "
                "actions.groups must be [photometric], or use kind vit"
            )
        if self.train.activation_checkpointing and self.train.precision == "bf16" and self.zero.stage == 0:
            raise ValueError(
                "train.activation_checkpointing in bf16 needs zero.stage 1, 2 or 3: stage 0 rounds its fp32 "
                "weights for the forward pass only, and recomputation would read them unrounded"
            )
        if self.train.cuda_graph and self.model.attention in ("sdpa", "cudnn"):
            raise ValueError(
                f"train.cuda_graph needs packed attention: model.attention {self.model.attention} takes images of one "
                "length at a time, with other kernels for every batch; use auto"
            )
        for key in ("compile", "target_stream", "cuda_graph"):
            if getattr(self.train, key) and self.zero.stage == 3:
                raise ValueError(
                    f"train.{key} needs zero.stage 0, 1 or 2: stage 3 gathers parameters as each module's forward "
                    "begins, one module at a time"
                )
        if self.train.optimizer == "lamb" and self.zero.stage:
            raise ValueError(
                f"train.optimizer lamb scales by norms of whole tensors, which zero.stage {self.zero.stage} divides; "
                "use zero.stage 0, or adamw"
            )
        if self.data.wait_s >= self.train.rank_timeout_s:
            raise ValueError(
                f"data.wait_s is {self.data.wait_s:g}; it must be below train.rank_timeout_s "
                f"({self.train.rank_timeout_s:g}), or a rank that waits for its data counts as hung"
            )
        if self.eval.every_steps is not None and self.eval.root is None:
            raise ValueError("eval.every_steps is set and eval.root is not; name the folder to evaluate on")
        patches = self.model.grid**2
        if self.masks.min_context >= patches:
            raise ValueError(f"masks.min_context is {self.masks.min_context}; a view has only {patches} patches")
        return self
