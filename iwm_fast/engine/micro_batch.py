"""Arguments of the model's forward pass for a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_fast.config import Config
from iwm_fast.cost.tokens import rounding_of
from iwm_fast.data.batch import Batch
from iwm_fast.errors import UserError
from iwm_fast.models.later_steps import every_patch, later_steps
from iwm_fast.models.losses import GlobalBatch
from iwm_fast.models.objective import objective_of
from iwm_fast.models.packing import pack

__all__ = ["Packed", "Packer", "of_frames"]


@dataclass(frozen=True, eq=False)
class Packed:
    """arguments: of the model's forward pass, on its device. padding: padding tokens among them."""

    arguments: tuple[Any, ...]
    padding: int


class Packer:
    """Pack the micro-batches of one rank. sizes: the pairs (context, predicted) of token counts seen so far.

    With train.static_shapes such a pair determines the shapes of every kernel argument, because the number of images
    and of action components is constant.
    """

    def __init__(self, config: Config, micro_batch: int, predicts: str, device: torch.device, world: int) -> None:
        self._rounding = rounding_of(config, micro_batch)
        _require_whole_statistics(config, micro_batch, world)
        self.objective = objective_of(config.model)
        self._images, self._width = config.train.global_batch, config.model.target_architecture.shape.width
        self._world, self._micro_batches = world, config.train.global_batch // micro_batch
        self._history, self._every = config.model.history, config.model.grid**2
        self._horizon = config.train.horizon
        self._predicts, self._device, self._seed = predicts, device, config.train.seed
        self.sizes: set[tuple[int, int]] = set()

    def __call__(self, batch: Batch, step: int) -> Packed:
        """Return the batch's tensors on the device, its patches packed, and the factors of its loss's terms.

        step: counted from 0; seeds the random numbers of the loss terms.
        """
        device, patches = self._device, batch.patches
        seen, lengths = of_frames(patches.context, patches.context_lengths, self._history)
        context, visible = self._pack(seen, lengths)
        predicted, queried, tokens = context, visible, batch.global_context
        images, later = self._images, tuple[Any, ...]()
        if batch.steps is not None:
            predicted, queried = every_patch(len(batch), self._every, device)
            later = (later_steps(seen, lengths, batch.steps, self._horizon, self._every, device),)
            tokens, images = batch.global_target, batch.global_target // self._every
        elif self._predicts == "target":
            predicted, queried = self._pack(patches.target, patches.target_lengths)
            tokens = batch.global_target
        whole = GlobalBatch(
            self._world, self._micro_batches, images, batch.global_context * self._history, tokens,
            self._width,
        )  # fmt: skip
        self.sizes.add((visible.total, queried.total))
        padding = visible.total - visible.real + (queried.total - queried.real if queried is not visible else 0)
        arguments = (
            batch.source.to(device), batch.target.to(device), batch.action.to(device, non_blocking=True),
            context, visible, predicted, queried,
            self.objective.sample(self._seed, step, device), self.objective.factors(whole), *later,
        )  # fmt: skip
        return Packed(arguments, padding)

    def _pack(self, patches: Any, lengths: Any) -> tuple[torch.Tensor, Any]:
        if self._rounding is None:
            return pack(patches, lengths, self._device)
        padding = self._rounding.padding(len(patches))
        return pack(patches, lengths, self._device, padding, self._rounding.longest)


def of_frames(patches: NDArray[np.int64], lengths: NDArray[np.int64], frames: int) -> tuple[Any, Any]:
    """Return the packed patches and lengths of each frame, of sources of `frames` frames, from the sources' own."""
    if frames == 1:
        return patches, lengths
    parts = np.split(patches, np.cumsum(lengths)[:-1])
    return np.concatenate([part for part in parts for _ in range(frames)]), np.repeat(lengths, frames)


def _require_whole_statistics(config: Config, micro_batch: int, world: int) -> None:
    """Raise UserError if a statistic of the global batch would be computed per micro-batch."""
    kind, share = config.model.regularizer.kind, config.train.global_batch // world
    if kind != "none" and micro_batch != share:
        raise UserError(
            f"model.regularizer.kind {kind} is a statistic of the whole global batch, but a rank computes its {share} "
            f"images in {share // micro_batch} micro-batches of {micro_batch}: set train.micro_batch={share}, use more "
            "ranks, or lower train.global_batch"
        )
