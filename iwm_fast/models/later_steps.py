"""Later steps of a training with `train.horizon`: what the predictor reads when its predictions are fed back.

Legend: B samples, of which B_t have step t (counted from 0); H frames of a source, L patches of a frame, A components
of an action. Step t reads a window of H frames: those of the source that are left, at the source's visible patches, and
the predictions so far, at all patches. Lengths are known on the host: nothing waits for a device. A sample whose
episode has ended is no part of the batch any more; a step that no sample has is an empty batch, because at ZeRO stage 3
all ranks call the predictor equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.models.packing import Segments, to_device
from iwm_fast.models.predictors import VitPredictor

__all__ = ["LaterStep", "every_patch", "fed_back", "later_steps"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LaterStep:
    """A step of B_t samples. rows: int64 (Nc,), their windows' tokens, as rows of the source's and then all earlier
    predictions' tokens. context: int64 (Nc,), the tokens' patches. segments: of the frames of the windows.
    """

    rows: Tensor
    context: Tensor
    segments: Segments
    samples: int


def later_steps(
    context: Ints, lengths: Ints, steps: Ints, horizon: int, every: int, device: torch.device | str = "cpu"
) -> tuple[LaterStep, ...]:
    """Return the steps after the first, horizon − 1 of them.

    Args:
        context: (N,), visible patches of the sources' frames, packed; all frames of a source have as many.
        lengths: (B · H,), of each frame.
        steps: (B,), the steps of each sample, at least 1.
        horizon: the most steps of a sample.
        every: L.
        device: of what is returned.

    """
    starts = (np.cumsum(lengths) - lengths).reshape(len(steps), -1)
    lengths = lengths.reshape(starts.shape)
    patches, rows_before = [context], len(context)
    found: list[LaterStep] = []
    for step in range(1, horizon):
        # The predictions of the step before follow all earlier tokens, those of one sample after the other's.
        had = np.flatnonzero(steps > step - 1)
        predicted = np.zeros((len(steps), 1), np.int64)
        predicted[had, 0] = rows_before + every * np.arange(len(had))
        starts = np.concatenate([starts[:, 1:], predicted], axis=1)
        lengths = np.concatenate([lengths[:, 1:], np.full_like(predicted, every)], axis=1)
        patches.append(np.tile(np.arange(every), len(had)))
        rows_before += every * len(had)
        going = steps > step
        rows = _ranges(starts[going].reshape(-1), lengths[going].reshape(-1))
        segments = Segments.from_lengths(lengths[going].reshape(-1), device)
        told = to_device(np.concatenate(patches)[rows], device)
        found.append(LaterStep(to_device(rows, device), told, segments, int(going.sum())))
    return tuple(found)


def every_patch(samples: int, every: int, device: torch.device | str) -> tuple[Tensor, Segments]:
    """Return all patches of all samples, int64 (samples · L,), and their segments."""
    return torch.arange(every, device=device).repeat(samples), Segments.uniform(samples, every, device)


def fed_back(predictor: VitPredictor, z: Tensor, first: Tensor, later: Sequence[LaterStep], action: Tensor) -> Tensor:
    """Return the predictions of all steps, step after step: (Σ B_t · L, D).

    z: (N, D), the source's tokens. first: (B · L, D), the first step's predictions. action: (Σ B_t, A), of all steps.
    """
    predictions, every = [first], len(predictor.pos_embed)
    done = len(first) // every
    for step in later:
        read = torch.cat([z, *predictions]).index_select(0, step.rows)
        told = action[done : done + step.samples]
        patches, queried = every_patch(step.samples, every, z.device)
        predictions.append(predictor(read, step.context, step.segments, patches, queried, told))
        done += step.samples
    return torch.cat(predictions)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, … of each range, one range after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
