"""The sizes of encoders, and the names of the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from iwm_fast.config.base import Section
from iwm_fast.config.registry import Registry

__all__ = [
    "ENCODERS",
    "EncoderArchitecture",
    "EncoderName",
    "EncoderShape",
    "Positions",
    "register_encoder",
    "shape_of",
]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Positions = Literal["sincos", "learned", "rope"]


class EncoderShape(Section):
    """The size of a vision transformer."""

    depth: Count = Field(description="transformer blocks")
    width: Count = Field(description="token width D; a multiple of heads and of 4 (sin-cos positions)")
    heads: Count = Field(description="attention heads")
    mlp_ratio: Positive = Field(4.0, description="hidden width of each block's MLP over the token width")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads}) and of 4")
        return self


@dataclass(frozen=True)
class EncoderArchitecture:
    """All that an encoder's weights depend on.

    shape: depth, width and heads. image, patch: sides in pixels. prefix_tokens: learned tokens before the patches of
    each image, never returned. positions: of the patches. norm_eps: of all normalisations. rope_base: of the periods of
    rope, unused by the others.
    """

    shape: EncoderShape
    image: int
    patch: int
    prefix_tokens: int = 0
    positions: Positions = "sincos"
    norm_eps: float = 1e-6
    rope_base: float = 100.0

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


ENCODERS: dict[str, EncoderShape] = {
    "vit_micro": EncoderShape(depth=4, width=128, heads=4),
    "vit_tiny": EncoderShape(depth=12, width=192, heads=3),
    "vit_small": EncoderShape(depth=12, width=384, heads=6),
    "vit_base": EncoderShape(depth=12, width=768, heads=12),
    "vit_large": EncoderShape(depth=24, width=1024, heads=16),
    "vit_huge": EncoderShape(depth=32, width=1280, heads=16),
}
_NAMES: Registry[EncoderShape] = Registry("encoder", "model.encoder", ENCODERS)
EncoderName = Annotated[str, AfterValidator(_NAMES.require), WithJsonSchema({"enum": list(ENCODERS)})]


def register_encoder(name: str, *, depth: int, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
    """Give an encoder's size a name for ``model.encoder``. UserError where the name is taken; ValueError for a size."""
    _NAMES.add(name, EncoderShape(depth=depth, width=width, heads=heads, mlp_ratio=mlp_ratio))


def shape_of(name: str) -> EncoderShape:
    """The size of a built-in or registered encoder. KeyError where there is none of that name."""
    own = _NAMES.own(name)
    return ENCODERS[name] if own is None else own
