"""Terms of the loss, each with a formula, a weight and a divisor.

Each rank computes a term per micro-batch. Over a global batch its value is

    weight / divisor · Σ over ranks and micro-batches of the term

and the loss is the sum over the terms. The divisor makes a term a mean:

- of a sum over tokens: their number in the global batch, which every rank knows before the forward pass;
- of a statistic over all ranks' tokens, equal on every rank: `GlobalBatch.micro_batches`. Its moments are reduced by
  `ForwardPass.sum_over_ranks`, whose backward pass sums the gradients; then DeepSpeed's mean over the ranks is the
  gradient of that statistic. With several accumulated micro-batches it would be the mean of their statistics.

A term that needs random numbers is a `RandomTerm`: they are sampled for each step, outside the CUDA graph, and passed
in with the batch.

To add a term from a plugin, write a class like `LatentDistance`, register a function that returns an instance
(`objective.register_term`), and name it in ``model.terms``. In the package, append a function to `TERMS` of `objective`
and add a key to `ModelConfig`. Logging, accumulation, ranks, CUDA graphs and launch counts need no change.
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
    """Counts of a step's batch over all ranks and micro-batches.

    images: of targets. context: visible tokens of the sources. predicted: tokens to predict. width: D of a
    target's token.
    """

    ranks: int
    micro_batches: int
    images: int
    context: int
    predicted: int
    width: int


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """Outputs of the networks for a micro-batch.

    context: (Nc, D), the encoder's tokens of the sources' visible patches. prediction: (Nt, D), the predictor's.
    target: (M, D), the target encoder's, without gradient. rows: int64 (Nt,), the target row of each prediction, -1
    for padding; None: row i for prediction i. `context` has padding tokens too: those of segments beyond `images`.
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
    """One term of the loss. name: in the log. weight: its factor in the sum."""

    @property
    def name(self) -> str:
        """As in ``loss_NAME``."""

    @property
    def weight(self) -> float:
        """The factor of the term in the loss."""

    def divisor(self, batch: GlobalBatch) -> float:
        """Return the divisor of the sum over all ranks' micro-batches."""

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        """Return `factor` times the micro-batch's sum, an fp32 scalar.

        It is captured in a CUDA graph: it may not depend on lengths on the host, nor wait for the device.
        """


@runtime_checkable
class RandomTerm(Term, Protocol):
    """A term with random numbers, new ones in each step."""

    def sample(self, seed: int, step: int, device: torch.device) -> Tensor:
        """Return the random numbers of a step, counted from 0; the same on all ranks."""


@dataclass(frozen=True)
class LatentDistance:
    """The world model's loss: mean of (ẑ − z)² over predicted tokens and features; ``normalize``: LN(z) for z."""

    normalize: bool
    name: str = "prediction"
    weight: float = 1.0

    def divisor(self, batch: GlobalBatch) -> float:
        """Return the number of predicted tokens times their width."""
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
