"""Terms of the loss: each with its formula, its weight, and what its sum is divided by.

A term is computed per micro-batch, on each rank for itself. Over a global batch its value is

    weight / divisor · Σ over ranks and micro-batches of the term

and the loss is the sum over the terms. What a term is divided by makes it a mean:

- a sum over tokens: their number in the global batch, which every rank knows before it computes;
- a statistic of all ranks' tokens together, equal on every rank: `GlobalBatch.micro_batches`. Its moments are reduced
  by `ForwardPass.sum_over_ranks`, whose backward pass sums the gradients; then DeepSpeed's mean over the ranks is the
  gradient of that statistic. Of several accumulated micro-batches it would be the mean of theirs.

A term that needs random numbers is a `RandomTerm`: they are sampled for each step, outside a CUDA graph, and come in
with the batch.

To add a term from a plugin, write an object as `LatentDistance` and register a function that gives it
(`objective.register_term`); ``model.terms`` asks for it. In the package, append a function to `TERMS` of `objective`
and add the key that asks to `ModelConfig`. The log, accumulation, ranks, CUDA graphs and launch counts take it from
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from iwm_fast import kernels
from iwm_fast.models.blocks import NORM_EPS
from iwm_fast.models.packing import Segments

__all__ = ["ForwardPass", "GlobalBatch", "LatentDistance", "RandomTerm", "Term"]


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

    def sample(self, seed: int, step: int, device: torch.device) -> Tensor:
        """Return the numbers of a step, counted from 0, of a training's seed: the same on all ranks."""


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
