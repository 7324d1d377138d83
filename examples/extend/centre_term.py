"""A term of the loss: the encoder's tokens should have mean 0 over the global batch, ‖mean token‖² / D."""

from dataclasses import dataclass

import torch
from torch import Tensor

from iwm_fast.config import ModelConfig
from iwm_fast.models.losses import ForwardPass, GlobalBatch
from iwm_fast.models.objective import register_term


@dataclass(frozen=True)
class Centre:
    """The mean is of all ranks' tokens; of several accumulated micro-batches, the term is the mean of theirs."""

    weight: float
    name: str = "centre"

    def divisor(self, batch: GlobalBatch) -> float:
        return batch.micro_batches

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        segments = found.context_segments
        real = segments.image_of_token < segments.images  # the others are padding
        tokens = torch.where(real[:, None], found.context.float(), 0.0)
        sums = found.sum_over_ranks(torch.cat([tokens.sum(dim=0), real.sum().float()[None]]))
        return factor * (sums[:-1] / sums[-1]).square().mean()


@register_term("centre")
def centre(model: ModelConfig, weight: float) -> Centre:  # noqa: ARG001  (a term may depend on the model)
    """For ``model.terms=[centre=0.5]``."""
    return Centre(weight)
