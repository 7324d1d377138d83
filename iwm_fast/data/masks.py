"""Multi-block masks: which patches of a source the encoder sees, and which patches of the target are predicted.

Legend: B images, K target blocks, G patches along a side. Per image, K rectangles (the targets, which may overlap) and
one square (the context) are sampled; the context loses the targets' patches, except those of the last `visible_blocks`
targets that no other target covers. As in I-JEPA (arXiv:2301.08243, section 3), without its sampler's errors: positions
include the last row and column, sizes are sampled per image and block, and no image is cut to the batch's shortest. A
function of (seed, epoch, sample id) alone, vectorised over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.config.schema import Config, MasksConfig
from iwm_fast.data.randomness import MASKS, uniforms

__all__ = ["MaskSampler", "PatchSets", "mask_sampler"]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Attempts before the fallback. With the default masks none of 100,000 images on a 14 × 14 grid needed a second one, and
# 59 on 8 × 8.
_ATTEMPTS = 20


@dataclass(frozen=True, eq=False)
class PatchSets:
    """Patches of B images, packed: all of the first image, then all of the second.

    context: int64 (Nc,), row-major patch indices, ascending within an image; context_lengths: int64 (B,), how many per
    image. target: int64 (Nt,), the union of an image's target blocks, in the same form; target_lengths: int64 (B,).
    """

    context: Ints
    context_lengths: Ints
    target: Ints
    target_lengths: Ints

    def __len__(self) -> int:
        return len(self.context_lengths)


class MaskSampler:
    """Samples `PatchSets`; exclude: the context loses the targets' patches (False where the views' grids differ).

    sources: K masks per sample, adjacent; the first does not depend on K.
    """

    def __init__(self, masks: MasksConfig, grid: int, seed: int, *, exclude: bool = True, sources: int = 1) -> None:
        """`grid`: patches along a side. Raises ValueError where min_context leaves no patch to predict."""
        if grid < 1 or masks.min_context >= grid**2:
            raise ValueError(f"min_context is {masks.min_context}; it must be below the grid's {grid}² patches")
        self.masks = masks
        self.grid = grid
        self.seed = seed
        self.exclude = exclude
        self.sources = sources

    def draw(self, epoch: Ints, sample: Ints) -> PatchSets:
        """Return the patches of B samples, B · K rows; epoch and sample: int64 (B,)."""
        context, target = self._draw(np.asarray(epoch, np.int64), np.asarray(sample, np.int64))
        return PatchSets(*_pack(context), *_pack(target))

    def totals(self, epoch: Ints, sample: Ints) -> tuple[int, int]:
        """Return the context and target patches of all samples together, which every rank needs of the global batch."""
        context, target = self._draw(np.asarray(epoch, np.int64), np.asarray(sample, np.int64))
        return int(np.count_nonzero(context)), int(np.count_nonzero(target))

    def _draw(self, epoch: Ints, sample: Ints) -> tuple[Bools, Bools]:
        """Context and target as bool (B · K, G·G)."""
        drawn = [self._draw_source(epoch, sample, k * _ATTEMPTS) for k in range(self.sources)]
        context, target = (np.stack(sets, axis=1).reshape(-1, self.grid**2) for sets in zip(*drawn, strict=True))
        return context, target

    def _draw_source(self, epoch: Ints, sample: Ints, first: int) -> tuple[Bools, Bools]:
        """Context and target as bool (B, G·G), from the attempts `first` and later."""
        context, blocks = self._attempt(epoch, sample, first)
        target = _union(blocks)
        short = np.flatnonzero(context.sum(axis=1) < self.masks.min_context)
        blocks = blocks[short]
        for attempt in range(first + 1, first + _ATTEMPTS):
            if not len(short):
                return context, target
            context[short], blocks = self._attempt(epoch[short], sample[short], attempt)
            target[short] = _union(blocks)
            still = context[short].sum(axis=1) < self.masks.min_context
            short, blocks = short[still], blocks[still]
        if len(short):
            context[short], target[short] = self._fall_back(blocks)
        return context, target

    def _attempt(self, epoch: Ints, sample: Ints, attempt: int) -> tuple[Bools, Bools]:
        """One attempt: the context's patches, bool (B, G·G), and the target blocks, bool (B, K, G·G)."""
        count = self.masks.target_blocks
        places = 4 * (count + 1)
        draws = uniforms(self.seed, epoch, sample, MASKS, places, start=attempt * places)
        draws = draws.reshape(len(draws), count + 1, 4)  # the last axis: scale, aspect, row, column
        low, high = np.array([self.masks.target_scale] * count + [self.masks.context_scale]).T
        narrow, wide = np.array([self.masks.target_aspect] * count + [(1.0, 1.0)]).T
        area = self.grid**2 * (low + (high - low) * draws[:, :, 0])
        aspect = narrow + (wide - narrow) * draws[:, :, 1]
        sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=2))
        sides = np.clip(np.rint(sides), 1, self.grid)  # (B, K + 1, 2): height, width
        first = np.floor(draws[:, :, 2:] * (self.grid - sides + 1))
        line = np.arange(self.grid)
        inside = (line >= first[..., None]) & (line < (first + sides)[..., None])  # (B, K + 1, 2, G)
        boxes = inside[:, :, 0, :, None] & inside[:, :, 1, None, :]
        boxes = boxes.reshape(len(boxes), count + 1, self.grid**2)
        context, blocks = boxes[:, count], boxes[:, :count]
        if self.exclude:
            context = context & ~_union(blocks[:, : count - self.masks.visible_blocks])
        return context, blocks

    def _fall_back(self, blocks: Bools) -> tuple[Bools, Bools]:
        """Context and target from the last attempt's blocks (B, K, G·G), where no attempt left enough context.

        The context is all that lies outside the targets; if that is too little, the last blocks are dropped, then the
        last patches of the remaining one, so that at least min_context patches are visible and one is predicted.
        """
        if not self.exclude:
            return np.ones_like(blocks[:, 0]), _union(blocks)
        most = self.grid**2 - self.masks.min_context
        unions = np.logical_or.accumulate(blocks, axis=1)  # of the first, the first two, ... blocks
        kept = np.maximum((unions.sum(axis=2) <= most).sum(axis=1), 1)
        target = unions[np.arange(len(blocks)), kept - 1]
        target &= np.cumsum(target, axis=1) <= most
        return ~target, target


def mask_sampler(config: Config, seed: int | None = None) -> MaskSampler:
    """Return the sampler of a configuration's masks; ``seed`` replaces ``train.seed``."""
    return MaskSampler(
        config.masks,
        config.model.grid,
        config.train.seed if seed is None else seed,
        exclude=not config.actions.geometric,
        sources=config.views.sources_per_target,
    )


def _union(blocks: Bools) -> Bools:
    """Patches in any of an image's blocks: (B, K, G·G) to (B, G·G)."""
    return np.asarray(blocks.any(axis=1))


def _pack(chosen: Bools) -> tuple[Ints, Ints]:
    """Column numbers of the true entries, row after row, and how many each row has."""
    lengths = chosen.sum(axis=1, dtype=np.int64)
    flat = np.flatnonzero(chosen)
    return flat - np.repeat(np.arange(len(chosen)) * chosen.shape[1], lengths), lengths
