"""What a training minimises: named terms, each with its formula, its weight, and what its sum is divided by.

A term is computed per micro-batch, on each rank for itself. Over a global batch its value is

    weight / divisor · Σ over ranks and micro-batches of the term

and the loss is the sum over the terms. What a term is divided by makes it a mean:

- a sum over tokens: their number in the global batch, which every rank knows before it computes;
- a statistic of all ranks' tokens together, equal on every rank: `GlobalBatch.micro_batches`. Its moments are reduced
  by `ForwardPass.sum_over_ranks`, whose backward pass sums the gradients; then DeepSpeed's mean over the ranks is the
  gradient of that statistic. Of several accumulated micro-batches it would be the mean of theirs.

A term that needs random numbers is a `RandomTerm`: they are sampled for each step, outside a CUDA graph, and come in
with the batch.

To add a term, write an object as `LatentDistance` in a module of its own, append to `TERMS` the function that gives it
for a configuration that asks for it, and add the key to `ModelConfig`. The log, accumulation, ranks, CUDA graphs and
launch counts take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from iwm_fast import kernels
from iwm_fast.config.schema import ModelConfig
from iwm_fast.models.blocks import NORM_EPS
from iwm_fast.models.packing import Segments

__all__ = [
    "TERMS",
    "ForwardPass",
    "GlobalBatch",
    "LatentDistance",
    "Objective",
    "RandomTerm",
    "Term",
    "objective_of",
    "together",
]


@dataclass(frozen=True)
class GlobalBatch:
    """How much a step's batch holds, over all ranks and micro-batches.

    images: of targets. context: visible tokens of the sources. predicted: tokens to predict. width: D of a token.
    """

    ranks: int
    micro_batches: int
    images: int
    context: int
    predicted: int
    width: int


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """What the networks made of a micro-batch.

    context: (Nc, D), the encoder's tokens of the sources' visible patches. prediction: (Nt, D), the predictor's.
    target: (M, D), the target encoder's, without gradient. rows: int64 (Nt,), the target's row of each prediction, -1
    for padding; None: each its own. Tokens of padding lie in `context` too: those of segments beyond `images`.
    context_patches: int64 (Nc,), the patch of each context token. sampled: the numbers of each `RandomTerm`, by its
    name. sum_over_ranks: a tensor's sum over all ranks, with gradient.
    """

    context: Tensor
    context_patches: Tensor
    context_segments: Segments
    prediction: Tensor
    predicted_segments: Segments
    target: Tensor
    rows: Tensor | None
    sampled: Mapping[str, Tensor]
    sum_over_ranks: Callable[[Tensor], Tensor]


class Term(Protocol):
    """One part of what is minimised. name: in the log. weight: among the terms."""

    @property
    def name(self) -> str:
        """As in ``loss_NAME``."""

    @property
    def weight(self) -> float:
        """What the term is multiplied by."""

    def divisor(self, batch: GlobalBatch) -> float:
        """What the sum over all ranks' micro-batches is divided by."""

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        """Return `factor` times the micro-batch's sum, an fp32 scalar.

        Nothing may depend on lengths on the host, nor wait for the device: a CUDA graph is captured of it.
        """


@runtime_checkable
class RandomTerm(Term, Protocol):
    """A term that computes with random numbers, others in each step."""

    def sample(self, step: int, device: torch.device) -> Tensor:
        """Return the numbers of a step, counted from 0: the same on all ranks and after a resume."""


@dataclass(frozen=True)
class LatentDistance:
    """The world model's loss: mean of (ẑ − z)² over predicted tokens and features; z layer-normalised where asked."""

    normalize: bool
    name: str = "prediction"
    weight: float = 1.0

    def divisor(self, batch: GlobalBatch) -> float:
        """Predicted tokens times their width."""
        return batch.predicted * batch.width

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        """Return factor · Σ‖ẑ − z‖², from one kernel."""
        return kernels.stopgrad_l2(
            found.prediction,
            found.target,
            index=found.rows,
            normalize_target=self.normalize,
            reduction="sum",
            scale=factor,
            eps=NORM_EPS,
        )


# What each configuration minimises: a function gives its term, or None where the configuration does not ask for it.
TERMS: tuple[Callable[[ModelConfig], Term | None], ...] = (lambda model: LatentDistance(model.normalize_target),)


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

    def sample(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return the random numbers of a step, a tensor for each of `random_terms`."""
        return tuple(term.sample(step, device) for term in self.random_terms)

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
