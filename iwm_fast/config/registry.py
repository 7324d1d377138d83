"""Names that a configuration may use, and the user's own beside them: sources of images, optimizers, terms of the loss.

Plugins (`plugins`) add to these tables; the rooms that use a table read it when a run asks for a name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, WithJsonSchema

from iwm_fast.config.base import Names
from iwm_fast.errors import UserError

__all__ = [
    "OPTIMIZERS",
    "SOURCES",
    "TERMS",
    "Optimizer",
    "OptimizerName",
    "Registry",
    "SourceName",
    "TermNames",
    "needs_whole_tensors",
    "term_and_weight",
]

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Generic[T]):
    """What a key may name. what: an entry in words. key: of the configuration. built_in: the package's own."""

    def __init__(self, what: str, key: str, built_in: Iterable[str] = ()) -> None:
        self.what, self.key, self.built_in = what, key, tuple(built_in)
        self._own: dict[str, T] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names: built-in ones, then the user's in the order of registration."""
        return (*self.built_in, *self._own)

    def add(self, name: str, entry: T) -> None:
        """Register an entry. UserError where the name is taken, or is no name."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{self.what} {name!r}: a name is lower-case letters, digits and _, a letter first")
        if name in self.names:
            whose = "built in" if name in self.built_in else "registered already"
            raise UserError(f"{self.what} {name}: the name is {whose}; choose another")
        self._own[name] = entry

    def own(self, name: str) -> T | None:
        """The user's entry of that name, None of a built-in or an unknown one."""
        return self._own.get(name)

    def require(self, name: str) -> str:
        """Return the name. ValueError where nothing of that name is there."""
        if name in self.names:
            return name
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        allowed = f"one of {', '.join(self.names)}" if self.names else "none without a plugin"
        raise ValueError(f'found "{name}"; allowed: {allowed}, or one that a module in plugins registers{hint}')


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of the user's own. kind: the class. whole_tensors: its update needs whole tensors (zero.stage 0)."""

    kind: Any
    whole_tensors: bool = False


SOURCES: Registry[Callable[[str], Any]] = Registry(
    "source", "data.source", ("auto", "folder", "webdataset", "tfrecord", "triplets")
)
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "train.optimizer", ("adamw", "lamb", "muon"))
TERMS: Registry[Callable[[Any, float], Any]] = Registry("term", "model.terms")


def needs_whole_tensors(optimizer: str) -> bool:
    """Whether its update reads whole tensors, so that it needs zero.stage 0."""
    own = OPTIMIZERS.own(optimizer)
    return optimizer in ("lamb", "muon") if own is None else own.whole_tensors


def term_and_weight(text: str) -> tuple[str, float]:
    """(name, weight) of NAME or NAME=WEIGHT, whose weight is 1 where none is given. ValueError for anything else."""
    name, equals, weight = text.partition("=")
    TERMS.require(name)
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'found "{text}"; a term is NAME, or NAME=WEIGHT with a number')
    return name, value


def _terms(texts: tuple[str, ...]) -> tuple[str, ...]:
    names = [term_and_weight(text)[0] for text in texts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"term {twice} is given twice; give it once")
    return texts


SourceName = Annotated[str, AfterValidator(SOURCES.require), WithJsonSchema({"enum": list(SOURCES.built_in)})]
OptimizerName = Annotated[str, AfterValidator(OPTIMIZERS.require), WithJsonSchema({"enum": list(OPTIMIZERS.built_in)})]
TermNames = Annotated[Names, AfterValidator(_terms)]
