"""Keys of external actions: recorded ones, of games or robots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import Names, Numbers, Section

__all__ = ["EXTERNAL", "ExternalActions", "still"]

# The value of actions.groups for the actions of a manifest.
EXTERNAL = ("external",)
# Augmentations that are allowed on triplets, because they act on both images alike and so are no part of the action.
_ALIKE = ("flip_probability", "rotation_probability")


class ExternalActions(Section):
    """External actions as a manifest of triplets describes them; a run records them here."""

    kind: Literal["continuous", "discrete"] = Field(description="one number per component, or one choice of several")
    names: Names = Field(description="names of the components, or of the choices")
    low: Numbers = Field((), description="lowest value of each component; continuous only")
    high: Numbers = Field((), description="highest value of each component; continuous only")
    neutral: Numbers = Field((), description="value that is encoded as 0, within low and high; continuous only")

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
    """Return (defaults, must_be_zero) of the section ``actions`` for triplets, which are not augmented by default.

    keys: the section's keys. defaults: every probability 0 and the whole image as crop; must_be_zero: the probabilities
    that stay 0.
    """
    chances = [key for key in keys if key.endswith("_probability")]
    return {**dict.fromkeys(chances, 0.0), "crop_scale": (1.0, 1.0)}, tuple(k for k in chances if k not in _ALIKE)
