"""What all sections of a configuration share, and the types of their lists."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Names", "Numbers", "Range", "Section", "pair"]


class Section(BaseModel):
    """What all sections share: immutable, no unknown key, no silent conversion of a string to a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def pair(value: object) -> object:
    """YAML has lists only; a pair is kept as a tuple so that a configuration stays hashable and immutable."""
    return tuple(value) if isinstance(value, list) else value


Range = Annotated[tuple[float, float], BeforeValidator(pair)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[tuple[Finite, ...], BeforeValidator(pair)]
Names = Annotated[tuple[str, ...], BeforeValidator(pair)]
