"""A term beside the world model's own, of the kind that is planned: a statistic of the tokens of all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.models import losses
from iwm_fast.models.losses import ForwardPass, GlobalBatch


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


def _summed(x: Tensor) -> Tensor:
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


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
        total, squares, count = _SumOverRanks.apply(moments).split([x.shape[1], x.shape[1], 1])
        variance = squares / count - (total / count).square()
        return factor * F.relu(2 - (variance + 1e-4).sqrt()).mean()


WITH_VARIANCE = (*losses.TERMS, lambda _: Variance())
