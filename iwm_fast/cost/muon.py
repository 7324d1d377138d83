"""What Muon's matmuls cost, and which rank computes which matrix's; `engine.muon` runs them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from iwm_fast.cost.memory import Layout

__all__ = ["ITERATIONS", "fullest_rank", "is_orthogonalised", "matrices_of", "matrix_flops", "owners"]

ITERATIONS = 5  # Jordan's, of Newton and Schulz
Shape = tuple[int, ...]


def matrix_flops(shape: Shape) -> int:
    """Return the operations for one matrix: three matmuls per iteration."""
    small, large = sorted(shape)
    return ITERATIONS * (4 * small**2 * large + 2 * small**3)


def is_orthogonalised(shape: Shape, *, decayed: bool) -> bool:
    """Return whether Muon updates a parameter: matrices with decay; AdamW has the others."""
    return decayed and len(shape) == 2


def matrices_of(layout: Layout) -> tuple[Shape, ...]:
    """Return the shapes of what Muon updates."""
    return tuple(p.shape for p in layout.trained if is_orthogonalised(p.shape, decayed=p.decayed))


@lru_cache(maxsize=8)
def owners(shapes: tuple[Shape, ...], world: int) -> tuple[int, ...]:
    """Return each matrix's rank: from the largest to the smallest, the rank with the fewest operations so far."""
    found, loads = [0] * len(shapes), [0] * world
    for place in sorted(range(len(shapes)), key=lambda i: -matrix_flops(shapes[i])):
        rank = loads.index(min(loads))
        found[place] = rank
        loads[rank] += matrix_flops(shapes[place])
    return tuple(found)


@lru_cache(maxsize=8)  # asked in each step
def fullest_rank(shapes: tuple[Shape, ...], world: int) -> tuple[int, int]:
    """Return the most operations and the most elements that any rank has."""
    ranks = np.array(owners(shapes, world), np.int64)
    flops = np.bincount(ranks, [float(matrix_flops(s)) for s in shapes])
    elements = np.bincount(ranks, [float(np.prod(s)) for s in shapes])
    return int(flops.max(initial=0)), int(elements.max(initial=0))
