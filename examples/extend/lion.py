"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum, with decoupled weight decay."""

from typing import Any

import torch
from torch import Tensor

from iwm_fast.engine.optimizer import FiniteAdamW, GroupTensors, register_optimizer


@register_optimizer("lion")
class Lion(FiniteAdamW):
    """Elementwise, so that it runs at ZeRO stages 0, 1 and 2. The second moment stays 0."""

    def move(self, group: dict[str, Any], own: GroupTensors, found_inf: Tensor, scale: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        moved = 1.0 - found_inf  # 0 in a step that is skipped because a gradient is not finite
        for weight, gradient, momentum in zip(own.weights, own.grads, own.first, strict=True):
            grad = torch.where(moved > 0, gradient if scale is None else gradient / scale, 0.0)
            direction = torch.lerp(grad, momentum, beta1).sign().add_(weight, alpha=group["weight_decay"])
            weight.sub_(direction * (group["lr"] * moved))
            momentum.add_((grad - momentum) * ((1.0 - beta2) * moved))
