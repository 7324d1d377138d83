"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices; AdamW for all other parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from iwm_fast.cost.flops import MUON_ITERATIONS
from iwm_fast.engine.optimizer import FiniteAdamW, GroupTensors

__all__ = ["FiniteMuon", "orthogonal"]

# Jordan's: of the momentum, and of the polynomial a·s + b·s³ + c·s⁵, whose slope at 0 is large.
_MOMENTUM = 0.95
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
# The root mean square of AdamW's update (Liu et al. 2025, arXiv:2502.16982), so that lr and decay mean the same.
_RMS = 0.2


def orthogonal(matrices: Tensor, working: torch.dtype) -> Tensor:
    """Return U Vᵀ of each matrix U S Vᵀ, with singular values of 0.7 to 1.2 in place of 1: Newton–Schulz iterations.

    matrices: fp32 (K, M, N). Result (K, M, N), of the type ``working``, in which the matmuls run. Of a matrix of zeros:
    zeros. A singular value below a thousandth of the matrix's norm stays below 0.7.
    """
    a, b, c = _POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(working)
    for _ in range(MUON_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class FiniteMuon(FiniteAdamW):
    """Muon for the decayed matrices, AdamW for biases, norms and tokens.

    A matrix moves by lr · 0.2 · √max(M, N) · `orthogonal`(Nesterov momentum). The second moment of a matrix stays 0, so
    that checkpoints are AdamW's. At ZeRO stage 0 only, because it needs whole matrices.

    ``working``: type of the matmuls.
    """

    def __init__(self, params: Any, *, working: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(params, **options)
        self.working = working

    def move(self, group: dict[str, Any], own: GroupTensors, found_inf: Tensor, scale: Tensor | None) -> None:
        """Update one group; the matrices of one shape together."""
        shapes = [w.shape if group["decayed"] and w.ndim == 2 else None for w in own.weights]
        places: dict[torch.Size | None, list[int]] = defaultdict(list)
        for place, shape in enumerate(shapes):
            places[shape].append(place)
        for shape, chosen in places.items():
            some = GroupTensors(*([tensors[place] for place in chosen] for tensors in own))
            if shape is None:
                super().move(group, some, found_inf, scale)
            else:
                self._move_matrices(group, some, 1.0 - found_inf, scale)

    def _move_matrices(self, group: dict[str, Any], own: GroupTensors, moved: Tensor, scale: Tensor | None) -> None:
        """Update matrices of one shape, unless ``moved`` is 0.0: then momentum and weights keep their bits."""
        grads = torch.stack(own.grads)
        grads = torch.where(moved > 0, grads if scale is None else grads / scale, 0.0)
        torch._foreach_mul_(own.first, 1.0 - (1.0 - _MOMENTUM) * moved)
        torch._foreach_add_(own.first, list(grads), alpha=1.0 - _MOMENTUM)
        direction = orthogonal(grads.lerp(torch.stack(own.first), _MOMENTUM), self.working).float()
        torch._foreach_mul_(own.weights, 1.0 - group["lr"] * group["weight_decay"] * moved)
        step = group["lr"] * _RMS * max(direction.shape[1:]) ** 0.5
        torch._foreach_add_(own.weights, list(direction * moved), alpha=-step)
