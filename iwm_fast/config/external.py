"""Somebody else's actions as keys of a configuration."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import Names, Numbers, Section

__all__ = ["STILL", "UNTOLD", "ExternalActions"]


class ExternalActions(Section):
    """Somebody else's actions, as a manifest of triplets describes them; a run records them here."""

    kind: Literal["continuous", "discrete"] = Field(description="a number a component, or one choice of several")
    names: Names = Field(description="of the components, or of the choices")
    low: Numbers = Field((), description="least value of each component; continuous only")
    high: Numbers = Field((), description="greatest value of each component; continuous only")
    neutral: Numbers = Field((), description="value told as 0, within low and high; continuous only")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names is {list(self.names)}; it must hold one or more, all different")
        wanted = len(self.names) if self.kind == "continuous" else 0
        for name in ("low", "high", "neutral"):
            if len(getattr(self, name)) != wanted:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers; {self.kind} actions need {wanted}")
        if not all(a <= n <= b for a, n, b in zip(self.low, self.neutral, self.high, strict=True)):
            raise ValueError("low, neutral and high must ascend in each component")
        return self


# What is done to pairs of pictures unless a configuration says otherwise: nothing.
STILL: dict[str, Any] = {
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "solarize_probability": 0.0,
    "rotation_probability": 0.0,
    "crop_scale": (1.0, 1.0),
    "flip_probability": 0.0,
}
UNTOLD = ("jitter_probability", "grayscale_probability", "blur_probability", "solarize_probability")
