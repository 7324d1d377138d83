"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices; AdamW for all other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast.cost.muon import ITERATIONS, fullest_rank, is_orthogonalised, owners
from iwm_fast.engine.optimizer import FiniteAdamW, GroupTensors, zero_unless

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
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class FiniteMuon(FiniteAdamW):
    """Muon for the decayed matrices, AdamW for biases, norms and tokens.

    A matrix moves by lr · 0.2 · √max(M, N) · `orthogonal`(Nesterov momentum). The second moment of a matrix stays 0, so
    that checkpoints are AdamW's. At ZeRO stage 0 only, because it needs whole matrices. Each rank orthogonalises a part
    of them, and one all-gather gives all ranks all: n elements of ``working``, the type of the matmuls, once per step.
    """

    def __init__(self, params: Any, *, working: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(params, **options)
        self.working = working

    def move(self, group: dict[str, Any], own: GroupTensors, found_inf: Tensor, scale: Tensor | None) -> None:
        """Update one group."""
        chosen = [is_orthogonalised(w.shape, decayed=group["decayed"]) for w in own.weights]
        matrices, rest = (
            GroupTensors(*([t for t, c in zip(tensors, chosen, strict=True) if c is kind] for tensors in own))
            for kind in (True, False)
        )
        if rest.weights:
            super().move(group, rest, found_inf, scale)
        if matrices.weights:
            self._move_matrices(group, matrices, 1.0 - found_inf, scale)

    def _move_matrices(self, group: dict[str, Any], own: GroupTensors, moved: Tensor, scale: Tensor | None) -> None:
        """Update them, unless ``moved`` is 0.0: then momentum and weights keep their bits."""
        weights, grads, momenta = own.weights, own.grads, own.first
        zero_unless(moved, grads)
        if scale is not None:
            torch._foreach_div_(grads, torch.where(moved > 0, scale, 1.0))
        torch._foreach_mul_(momenta, 1.0 - (1.0 - _MOMENTUM) * moved)
        torch._foreach_add_(momenta, grads, alpha=1.0 - _MOMENTUM)
        torch._foreach_lerp_(grads, momenta, _MOMENTUM)
        directions = self._orthogonal(grads)
        torch._foreach_mul_(directions, [_RMS * max(w.shape) ** 0.5 for w in weights])
        torch._foreach_mul_(directions, moved)
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"] * moved)
        torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _orthogonal(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """`orthogonal` of each, fp32. Matrices of one shape are multiplied together, and each on its own rank."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        shapes = tuple(tuple(m.shape) for m in matrices)
        ranks = owners(shapes, world)
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, owner in enumerate(ranks):
            if owner == rank:
                together[shapes[place]].append(place)
        mine: dict[int, Tensor] = {}
        for places in together.values():
            result = orthogonal(torch.stack([matrices[place] for place in places]), self.working)
            result = result if world > 1 else result.float()  # one name: the next stack has the rounded one's memory
            mine.update(zip(places, result, strict=True))
        if world == 1:
            return [mine[place] for place in range(len(matrices))]
        _, most = fullest_rank(shapes, world)
        nothing = matrices[0].new_empty(0, dtype=self.working)
        sent = torch.cat([nothing, *(mine[place].reshape(-1) for place in sorted(mine))])
        sent = nn.functional.pad(sent, (0, most - len(sent)))
        everyone = sent.new_empty(world * most)
        dist.all_gather_into_tensor(everyone, sent)
        everyone = everyone.float()
        begins, found = [most * owner for owner in range(world)], []
        for m, owner in zip(matrices, ranks, strict=True):
            found.append(everyone[begins[owner] : begins[owner] + m.numel()].view(m.shape))
            begins[owner] += m.numel()
        return found
