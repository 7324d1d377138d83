"""A second term of the loss: a statistic of the tokens of all ranks together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.models import objective
from iwm_fast.models.losses import ForwardPass, GlobalBatch


@dataclass(frozen=True)
class Variance:
    """VICReg's variance term over the encoder's visible tokens: mean of max(0, 2 - std) over the features."""

    name: str = "variance"
    weight: float = 8.0

    def divisor(self, batch: GlobalBatch) -> float:
        return batch.micro_batches

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        segments = found.context_segments
        real = (segments.image_of_token < segments.images)[:, None]
        x = found.context.float() * real
        moments = torch.cat([x.sum(dim=0), x.square().sum(dim=0), real.sum().float()[None]])
        total, squares, count = found.sum_over_ranks(moments).split([x.shape[1], x.shape[1], 1])
        variance = squares / count - (total / count).square()
        return factor * F.relu(2 - (variance + 1e-4).sqrt()).mean()


WITH_VARIANCE = (*objective.TERMS, lambda _: Variance())
