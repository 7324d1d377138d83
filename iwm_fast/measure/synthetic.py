"""Batches without files: random pixels and actions, with masks sampled as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.config.batch import divide_batch
from iwm_fast.data.batch import Batch
from iwm_fast.data.masks import PatchSets, mask_sampler

__all__ = ["BatchStream", "synthetic_stream"]


class BatchStream:
    """A stream for `Trainer` that repeats given batches. Its `bad` is 0, because nothing is decoded."""

    bad = 0

    def __init__(self, batches: Sequence[Batch], accumulation: int = 1) -> None:
        self._batches, self.accumulation = list(batches), accumulation
        self.micro_batch = len(batches[0])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._batches

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


def synthetic_stream(
    config: Config, space: ActionSpace, device: torch.device, *, rank: int = 0, world: int = 1, steps: int = 2
) -> BatchStream:
    """Return the rank's share of `steps` different global batches on `device`, a function of train.seed alone.

    A global batch has train.global_batch images, each with views.sources_per_target sources of model.history frames
    and all steps of train.horizon.
    """
    sources = config.views.sources_per_target
    frames, horizon = sources * config.model.history, config.train.horizon
    micro, accumulation = divide_batch(config.train.global_batch, world, config.train.micro_batch)
    sampler = mask_sampler(config)
    side, size, share = config.model.image, config.train.global_batch, micro * accumulation
    generator = torch.Generator().manual_seed(config.train.seed * world + rank)
    batches = []
    for step in range(steps):
        ids = np.arange(step * size, (step + 1) * size)
        whole = sampler.draw(np.zeros_like(ids), ids)
        asked = int(whole.target_lengths.sum()) if horizon == 1 else size * horizon * config.model.grid**2
        totals = int(whole.context_lengths.sum()), asked
        for first in range(rank * share, (rank + 1) * share, micro):
            mine = ids[first : first + micro]
            source, target = (
                torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, generator=generator).to(device)
                for rows in (micro * frames, micro * horizon)
            )
            action = torch.randn(micro * sources * horizon, space.dim, generator=generator)
            ahead = np.full(micro, horizon) if horizon > 1 else None
            patches: PatchSets = sampler.draw(np.zeros_like(mine), mine)
            batches.append(Batch(source, target, action, patches, mine, np.zeros_like(mine), *totals, ahead))
    return BatchStream(batches, accumulation)
