"""LAMB (You et al. 2020, arXiv:1904.00962) for large batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iwm_fast.engine.optimizer import FiniteAdamW, GroupTensors, zero_unless

__all__ = ["FiniteLamb"]


class FiniteLamb(FiniteAdamW):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) for large batches.

    AdamW's direction with its decay, scaled for each decayed tensor by ‖w‖ / ‖direction‖; tensors without decay
    (biases, norms, the mask token) are not scaled. The moments are AdamW's, so checkpoints are the same. At ZeRO stage
    0 only, because the norms are of whole tensors.
    """

    def move(self, group: dict[str, Any], own: GroupTensors, found_inf: Tensor, scale: Tensor | None) -> None:
        """Update one group. In a skipped step the gradients' bits become zero and every factor leaves the weights
        unchanged.
        """
        weights, grads, first, second, counts = own
        (beta1, beta2), count = group["betas"], counts[0].double()
        moved = 1.0 - found_inf
        zero_unless(moved, grads)
        if scale is not None:
            torch._foreach_div_(grads, torch.where(moved > 0, scale, 1.0))
        torch._foreach_mul_(first, 1.0 - (1.0 - beta1) * moved)
        torch._foreach_add_(first, grads, alpha=1.0 - beta1)
        torch._foreach_mul_(second, 1.0 - (1.0 - beta2) * moved)
        torch._foreach_addcmul_(second, grads, grads, 1.0 - beta2)
        count = count.clamp_min(1.0)  # nothing was counted where the first steps are skipped
        direction = torch._foreach_div(first, (1.0 - beta1**count).float())  # noqa: SLF001
        size = torch._foreach_div(second, (1.0 - beta2**count).float())  # noqa: SLF001
        torch._foreach_sqrt_(size)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_div_(direction, size)
        if group["decayed"]:
            torch._foreach_add_(direction, weights, alpha=group["weight_decay"])
            norms = torch._foreach_norm(weights), torch._foreach_norm(direction)  # noqa: SLF001
            torch._foreach_mul_(direction, _trust(*norms))
        torch._foreach_mul_(direction, moved)
        torch._foreach_add_(weights, direction, alpha=-group["lr"])


def _trust(weights: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """‖w‖ / ‖direction‖, and 1 where either is 0."""
    return [torch.where((w > 0) & (d > 0), w / d, torch.ones_like(w)) for w, d in zip(weights, directions, strict=True)]
