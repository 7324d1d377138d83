"""What all sections of a configuration share, and the types of their values."""

from __future__ import annotations

import os
import re
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "Count",
    "Names",
    "NonNegative",
    "Numbers",
    "Place",
    "Positive",
    "Probability",
    "Range",
    "Section",
    "home_expanded",
    "pair",
    "require_ascending",
]


class Section(BaseModel):
    """What all sections share: immutable, no unknown key, no silent conversion of a string to a number.

    ``alternatives``: groups of keys that say one thing in several units; at most one of a group may differ from its
    default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="after")
    def _one_of_each_group(self) -> Self:
        for group in self.alternatives:
            given = [name for name in group if getattr(self, name) != type(self).model_fields[name].default]
            if len(given) > 1:
                found = ", ".join(f"{name} is {getattr(self, name):g}" for name in given)
                raise ValueError(f"{found}; give only one of {', '.join(group)}")
        return self


def pair(value: object) -> object:
    """YAML has lists only; a pair is kept as a tuple so that a configuration stays hashable and immutable."""
    return tuple(value) if isinstance(value, list) else value


_HOME = re.compile(r"~[\w.-]*(/|$)")


def home_expanded(text: str) -> str:
    """A path with ``~`` or ``~name`` at its beginning replaced by that home; a shell does so before a word only.

    ValueError where the home is not known; a folder that is really called ``~`` is ``./~``.
    """
    if not _HOME.match(text):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111  (an address keeps its slashes)
    if expanded == text:
        raise ValueError(f"{text}: whose home this is, is not known; write the whole path (./{text} for a folder here)")
    return expanded


def _place(value: object) -> object:
    if value == "":
        raise ValueError("an empty text; give a path, or null")
    return home_expanded(value) if isinstance(value, str) else value


Place = Annotated[str, BeforeValidator(_place)]
Range = Annotated[tuple[float, float], BeforeValidator(pair)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[tuple[Finite, ...], BeforeValidator(pair)]
Names = Annotated[tuple[str, ...], BeforeValidator(pair)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def require_ascending(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    """ValueError where a pair descends or leaves its range."""
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} is {list(pair)}; it must be ascending and within [{low:g}, {high:g}]")
