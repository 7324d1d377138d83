"""The base class of all sections of a configuration, and the types of their values."""

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
    """Base of all sections: immutable, rejects unknown keys, converts no string to a number.

    ``alternatives``: groups of keys that set one quantity in several units; at most one of a group may differ from its
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
    """Return a list as a tuple, which keeps a configuration hashable and immutable; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


_HOME = re.compile(r"~[\w.-]*(/|$)")


def home_expanded(text: str) -> str:
    """Return a path with a leading ``~`` or ``~name`` expanded, which a shell does not do after ``key=``.

    Raises ValueError where the home is unknown. Write ``./~`` for a folder of that name.
    """
    if not _HOME.match(text):
        return text
    expanded = os.path.expanduser(text)  # noqa: PTH111  (an address keeps its slashes)
    if expanded == text:
        raise ValueError(f"{text}: unknown home; write the whole path (./{text} for a folder of that name)")
    return expanded


def _place(value: object) -> object:
    if value == "":
        raise ValueError("empty; give a path, or null")
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
    """Raise ValueError where a pair descends or leaves [low, high]."""
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} is {list(pair)}; it must be ascending and within [{low:g}, {high:g}]")
