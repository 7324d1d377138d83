"""The micro-batch that data loading passes to the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.data.masks import PatchSets

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's micro-batch: B images, K sources each, S × S pixels, A components of an action.

    source: uint8 (B · K, S, S, 3) on DALI's device, the sources of an image adjacent; of triplets (B · H, S, S, 3), the
    H frames of a source (`model.history`) adjacent, the oldest first. target: uint8 (B, S, S, 3). action: float32
    (B · K, A), on the host. patches: of the B · K, on the host; all frames of a source have them. ids and epochs: int64
    (B,), indices into the image set, and their epoch. global_context and global_target: context tokens, of one frame
    per source, and target tokens of the whole global batch, over all ranks and micro-batches, which the global mean of
    the loss divides by.

    steps: of triplets with train.horizon above 1, int64 (B,): the steps that each sample has, fewer where its episode
    ends. Then target and action have a row for each step of each sample: those of all samples' first steps, of the
    second steps of those that have one, and so on; global_target counts all patches of these.
    """

    source: Tensor
    target: Tensor
    action: Tensor
    patches: PatchSets
    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    global_context: int
    global_target: int
    steps: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.ids)
