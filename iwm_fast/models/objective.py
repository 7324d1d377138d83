"""What a training minimises: the terms that its configuration asks for, weighted, summed and named for the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from iwm_fast.config import registry
from iwm_fast.config.schema import ModelConfig
from iwm_fast.errors import UserError
from iwm_fast.models.losses import ForwardPass, GlobalBatch, LatentDistance, RandomTerm, Term
from iwm_fast.models.regularizers import regularizer_of

__all__ = ["TERMS", "Objective", "objective_of", "register_term", "together"]

F = TypeVar("F", bound=Callable[[ModelConfig, float], Term])

# What each configuration minimises: a function gives its term, or None where the configuration does not ask for it.
TERMS: tuple[Callable[[ModelConfig], Term | None], ...] = (
    lambda model: LatentDistance(model.normalize_target),
    regularizer_of,
)


class Objective:
    """The terms of a training, in the order of `TERMS`."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)

    def factors(self, batch: GlobalBatch) -> tuple[float, ...]:
        """What each term of a micro-batch is multiplied by: its share of the global batch's value, times the ranks.

        DeepSpeed averages gradients over the ranks, and the log averages losses.
        """
        return tuple(term.weight * batch.ranks / term.divisor(batch) for term in self.terms)

    @property
    def random_terms(self) -> tuple[RandomTerm, ...]:
        """Those of the terms that compute with random numbers."""
        return tuple(term for term in self.terms if isinstance(term, RandomTerm))

    def sample(self, seed: int, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return the random numbers of a step of a training's seed, a tensor for each of `random_terms`."""
        return tuple(term.sample(seed, step, device) for term in self.random_terms)

    def values(self, found: ForwardPass, factors: Sequence[float]) -> tuple[Tensor, ...]:
        """Every term of a micro-batch times its factor."""
        return tuple(term(found, factor) for term, factor in zip(self.terms, factors, strict=True))

    def logged(self, values: Sequence[float]) -> dict[str, float]:
        """The record's keys: ``loss``, and each term as ``loss_NAME`` where there are several."""
        parts = {f"loss_{term.name}": value for term, value in zip(self.terms, values, strict=True)}
        return {"loss": float(sum(values)), **(parts if len(parts) > 1 else {})}


def objective_of(model: ModelConfig) -> Objective:
    """What a training of this configuration minimises.

    UserError where no plugin of this process registers one of ``model.terms``, and for two terms of one name.
    """
    built_in = (term(model) for term in TERMS)
    terms: list[Term] = [term for term in built_in if term is not None]
    for name, weight in model.weighted_terms:
        make = registry.TERMS.own(name)
        if make is None:
            raise UserError(f"model.terms: no plugin of this process registers {name}; add its module to plugins")
        terms.append(make(model, weight))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"model.terms: two terms are logged as loss_{twice}; give one of them another name")
    return Objective(terms)


def register_term(name: str) -> Callable[[F], F]:
    """Register the decorated function of (`ModelConfig`, weight), which gives a `Term`, for ``model.terms``.

    UserError where the name is taken.
    """

    def registered(make: F) -> F:
        registry.TERMS.add(name, make)
        return make

    return registered


def together(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, terms for the log): the sum of the terms, and each of them detached: () of one, (T,) of several."""
    if len(values) == 1:
        return values[0], values[0].detach()
    stacked = torch.stack(tuple(values))
    return stacked.sum(), stacked.detach()
