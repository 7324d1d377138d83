"""What a training minimises: the terms that its configuration asks for, weighted, summed and named for the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iwm_fast.config.schema import ModelConfig
from iwm_fast.models.losses import ForwardPass, GlobalBatch, LatentDistance, RandomTerm, Term
from iwm_fast.models.regularizers import regularizer_of

__all__ = ["TERMS", "Objective", "objective_of", "together"]

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
    """What a training of this configuration minimises."""
    terms = (term(model) for term in TERMS)
    return Objective([term for term in terms if term is not None])


def together(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, terms for the log): the sum of the terms, and each of them detached: () of one, (T,) of several."""
    if len(values) == 1:
        return values[0], values[0].detach()
    stacked = torch.stack(tuple(values))
    return stacked.sum(), stacked.detach()
