"""Keys of views, of the actions between them, and of masks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from iwm_fast.config.base import Count, NonNegative, Probability, Range, Section, pair, require_ascending
from iwm_fast.config.external import EXTERNAL, ExternalActions, still

__all__ = ["ActionsConfig", "MasksConfig", "ViewsConfig"]


_Group = Literal["photometric", "geometric", "compression", "external"]
_MORE = ((), ("geometric",), ("compression",), ("geometric", "compression"))
_GROUPS = tuple(("photometric", *more) for more in _MORE)


class ActionsConfig(Section):
    """Augmentations, their probability and strength, and which of them the predictor is conditioned on."""

    groups: Annotated[tuple[_Group, ...], BeforeValidator(pair)] = Field(
        ("photometric",),
        description="photometric, optionally followed by geometric, compression or both; or external: the actions of a "
        "manifest of triplets, whose images are not augmented unless crop_scale or flip_probability is set, which then "
        "act on both images alike",
    )
    external: ExternalActions | None = Field(
        None, description="the external actions; default: those of the manifest, which the run records here"
    )
    strength: NonNegative = Field(1.0, description="factor on the four jitter strengths; 2 is strong, 3 very strong")
    form: Literal["difference", "absolute"] = Field(
        "difference", description="encode jitter as target minus source (paper), or as the values of both views"
    )
    jitter_probability: Probability = Field(
        0.8, description="probability of colour jitter, for each view independently"
    )
    brightness: NonNegative = Field(0.4, description="factor uniform in 1 ± this, clipped at 0")
    contrast: NonNegative = Field(0.4, description="factor uniform in 1 ± this, clipped at 0")
    saturation: NonNegative = Field(0.2, description="factor uniform in 1 ± this, clipped at 0")
    hue: NonNegative = Field(0.1, description="in turns: 0.1 rotates by up to ± 36 degrees in YIQ; at most half a turn")
    grayscale_probability: Probability = Field(0.2, description="probability that the source becomes grayscale")
    blur_probability: Probability = Field(0.2, description="probability of a Gaussian blur of the source")
    blur_sigma: Range = Field((0.1, 2.0), description="sigma in pixels, uniform")
    solarize_probability: Probability = Field(0.1, description="probability that the source is solarized")
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = Field(128, description="invert levels at or above this")
    compression_probability: Probability = Field(
        0.5, description="compression group only: probability that the source is compressed as JPEG"
    )
    compression_quality: Annotated[tuple[int, int], BeforeValidator(pair)] = Field(
        (20, 95), description="compression group only: JPEG quality, whole numbers from 1 to 100, uniform"
    )
    crop_scale: Range = Field((0.3, 1.0), description="share of the image's area")
    crop_aspect: Range = Field((0.75, 4 / 3), description="width over height, log-uniform")
    flip_probability: Probability = Field(0.5, description="probability of a horizontal flip")
    rotation_probability: Probability = Field(
        0.75, description="geometric group only: probability of one, two or three quarter turns of the source"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        require_ascending("blur_sigma", self.blur_sigma, 0.01, 20.0)
        require_ascending("compression_quality", self.compression_quality, 1, 100)
        require_ascending("crop_scale", self.crop_scale, 0.01, 1.0)
        require_ascending("crop_aspect", self.crop_aspect, 0.1, 10.0)
        if self.groups not in (*_GROUPS, EXTERNAL):
            known = ", ".join(f"[{', '.join(groups)}]" for groups in _GROUPS)
            raise ValueError(f"groups is {list(self.groups)}; it must be {known} or [external]")
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
        """Whether the actions come from a manifest of triplets."""
        return self.groups == EXTERNAL

    @property
    def geometric(self) -> bool:
        """Whether the source has a geometry of its own, which the predictor is conditioned on."""
        return "geometric" in self.groups


class ViewsConfig(Section):
    """How many views an image gives."""

    sources_per_target: Count = Field(
        1, description="source views per target, of one decoded image, each with its own action and mask (paper: 1)"
    )


class MasksConfig(Section):
    """Multi-block masks (I-JEPA, section 3): the patches that the encoder does not see and the predictor predicts."""

    target_blocks: Count = Field(4, description="target blocks per image; the predictor predicts their union")
    visible_blocks: Annotated[int, Field(ge=0)] = Field(
        0,
        description="target blocks that the encoder still sees, where only the action's effect remains to predict; "
        "fewer than target_blocks, or all of them with external actions",
    )
    target_scale: Range = Field((0.15, 0.2), description="share of the patches in one target block")
    target_aspect: Range = Field((0.75, 1.5), description="height over width of a target block")
    context_scale: Range = Field((0.85, 1.0), description="share of the patches in the square context block")
    min_context: Count = Field(10, description="fewest patches that the encoder sees; masks with fewer are resampled")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        require_ascending("target_scale", self.target_scale, 0.001, 1.0)
        require_ascending("target_aspect", self.target_aspect, 0.1, 10.0)
        require_ascending("context_scale", self.context_scale, 0.001, 1.0)
        if self.visible_blocks > self.target_blocks:
            raise ValueError(f"visible_blocks is {self.visible_blocks}; it must not be above {self.target_blocks}")
        return self
