"""Somebody else's actions as keys of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import Names, Numbers, Section

__all__ = ["EXTERNAL", "ExternalActions", "still"]

# The groups of a configuration whose actions a manifest gives.
EXTERNAL = ("external",)
# What may be done to pairs of pictures though nobody is told of it: to both alike.
_ALIKE = ("flip_probability", "rotation_probability")


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


def still(keys: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is done to pairs of pictures unless a configuration says otherwise, nothing; and the chances that must be 0.

    keys: of the section of actions.
    """
    chances = [key for key in keys if key.endswith("_probability")]
    return {**dict.fromkeys(chances, 0.0), "crop_scale": (1.0, 1.0)}, tuple(k for k in chances if k not in _ALIKE)
