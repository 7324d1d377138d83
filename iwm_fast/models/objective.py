"""The training objective: the loss terms of a configuration, weighted, summed and named for the log."""

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

# Built-in terms: each function returns its term, or None if the configuration does not enable it.
TERMS: tuple[Callable[[ModelConfig], Term | None], ...] = (
    lambda model: LatentDistance(model.normalize_target),
    regularizer_of,
)


class Objective:
    """The terms of a training, in the order of `TERMS`."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)

    def factors(self, batch: GlobalBatch) -> tuple[float, ...]:
        """Return each term's factor for a micro-batch: its share of the global batch's value, times the ranks.

        DeepSpeed averages gradients over the ranks, and the log averages losses.
        """
        return tuple(term.weight * batch.ranks / term.divisor(batch) for term in self.terms)

    @property
    def random_terms(self) -> tuple[RandomTerm, ...]:
        """The terms with random numbers."""
        return tuple(term for term in self.terms if isinstance(term, RandomTerm))

    def sample(self, seed: int, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return the random numbers of a step, a tensor for each of `random_terms`."""
        return tuple(term.sample(seed, step, device) for term in self.random_terms)

    def values(self, found: ForwardPass, factors: Sequence[float]) -> tuple[Tensor, ...]:
        """Return every term of a micro-batch times its factor."""
        return tuple(term(found, factor) for term, factor in zip(self.terms, factors, strict=True))

    def logged(self, values: Sequence[float]) -> dict[str, float]:
        """Return the keys for the log: ``loss``, and ``loss_NAME`` per term if there are several."""
        parts = {f"loss_{term.name}": value for term, value in zip(self.terms, values, strict=True)}
        return {"loss": float(sum(values)), **(parts if len(parts) > 1 else {})}


def objective_of(model: ModelConfig) -> Objective:
    """Return the objective of a configuration.

    Raises UserError if no loaded plugin registers one of ``model.terms``, and for two terms with the same name.
    """
    built_in = (term(model) for term in TERMS)
    terms: list[Term] = [term for term in built_in if term is not None]
    for name, weight in model.weighted_terms:
        make = registry.TERMS.own(name)
        if make is None:
            raise UserError(f"model.terms: no loaded plugin registers {name}; add its module to plugins")
        terms.append(make(model, weight))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"model.terms: two terms are logged as loss_{twice}; rename one of them")
    return Objective(terms)


def register_term(name: str) -> Callable[[F], F]:
    """Register the decorated function of (`ModelConfig`, weight), which returns a `Term`, for ``model.terms``.

    Raises UserError if the name is taken.
    """

    def registered(make: F) -> F:
        registry.TERMS.add(name, make)
        return make

    return registered


def together(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (loss, terms for the log): the sum of the terms, and the terms detached: () for one, (T,) for several."""
    if len(values) == 1:
        return values[0], values[0].detach()
    stacked = torch.stack(tuple(values))
    return stacked.sum(), stacked.detach()
