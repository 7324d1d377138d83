"""What an optimizer's update holds for a moment, above weights, gradients and moments; `engine.lamb` and `engine.muon`
allocate it. AdamW's is one fused kernel and holds nothing.
"""

from __future__ import annotations

from collections import Counter

from iwm_fast.config import Config
from iwm_fast.cost.memory import Layout
from iwm_fast.cost.muon import Shape, fullest_rank, matrices_of, owners

__all__ = ["update_bytes"]

_FULL = 4  # bytes of fp32


def update_bytes(config: Config, layout: Layout, world: int) -> int:
    """Return the most bytes of the fullest rank. Of an optimizer that a plugin registers: 0, because it is unknown."""
    working = 2 if config.train.precision == "bf16" else _FULL
    if config.train.optimizer == "lamb":
        # The direction and its divisor, a group after the other.
        decayed = sum(p.size for p in layout.trained if p.decayed)
        return 2 * _FULL * max(decayed, layout.trained_size - decayed)
    if config.train.optimizer == "muon":
        shapes = matrices_of(layout)
        return _one_rank(shapes, working) if world == 1 else _many_ranks(shapes, world, working)
    return 0


def _one_rank(shapes: tuple[Shape, ...], working: int) -> int:
    """Matrices of one shape are multiplied together, and those of the shapes before are there, in fp32."""
    most, before = 0, 0
    for shape, count in Counter(shapes).items():
        size = count * shape[0] * shape[1]
        most = max(most, _FULL * before + _matmuls(shape, count, working))
        before += size
    return max(most, _FULL * before)


def _many_ranks(shapes: tuple[Shape, ...], world: int, working: int) -> int:
    """As of one rank, with its results in the matmuls' type; then own, sent and gathered, and those in fp32."""
    ranks, (_, elements) = owners(shapes, world), fullest_rank(shapes, world)
    most = 0
    for rank in range(world):
        before = 0
        for shape, count in Counter(s for s, own in zip(shapes, ranks, strict=True) if own == rank).items():
            most = max(most, working * before + _matmuls(shape, count, working))
            before += count * shape[0] * shape[1]
    gathered = working + (_FULL if working < _FULL else 0)
    return max(most, 2 * working * elements + gathered * world * elements)


def _matmuls(shape: Shape, count: int, working: int) -> int:
    """`engine.muon.orthogonal` of a stack: its fp32 copy while it is divided by the norms and rounded; in an iteration
    two of the stack and two of its Gram matrices.
    """
    size, square = count * shape[0] * shape[1], count * min(shape) ** 2
    rounded = _FULL + working if working < _FULL else _FULL
    return _FULL * size + max(rounded * size, working * 2 * (size + square))
