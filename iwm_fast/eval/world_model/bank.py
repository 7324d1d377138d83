"""The bank of an image: many distinct colour jitters of its clean view, and the actions that lead to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER, Jitter, colour_matrix
from iwm_fast.config import ActionsConfig
from iwm_fast.data.views.sampling import draw_bank

__all__ = ["Bank", "jittered_views", "make_bank"]


@dataclass(frozen=True, eq=False)
class Bank:
    """The jitters (count,) of one image and the actions (count, A) that lead to them from its clean view.

    ``pictures``: uint8 (count, S, S, 3), the targets themselves if they are not jitters of the image. ``source``: uint8
    (S, S, 3), the encoder's input if it is not the image.
    """

    jitter: Jitter
    actions: np.ndarray  # float32
    pictures: Tensor | None = None
    source: Tensor | None = None

    def targets(self, image: Tensor) -> Tensor:
        """Return the bank's views of ``image`` (S, S, 3) uint8, on its device: (count, S, S, 3) uint8."""
        return jittered_views(image, self.jitter) if self.pictures is None else self.pictures.to(image.device)


def make_bank(
    actions: ActionsConfig, space: ActionSpace, sample: int, count: int, *, seed: int = 0, vary: str | None = None
) -> Bank:
    """Return the bank of image number ``sample``: a function of (seed, sample) alone, with the configured strengths.

    ``vary`` names the only component that varies; the others are then neutral. Raise ValueError for another name.
    """
    jitter = draw_bank(actions, seed, sample, count)
    neutral = Jitter.neutral(count)
    if vary is not None:
        if vary not in JITTER:
            raise ValueError(f"vary is {vary!r}; it must be one of {', '.join(JITTER)}, or None")
        jitter = Jitter(**{name: getattr(jitter if name == vary else neutral, name) for name in JITTER})
    return Bank(jitter, space.jitter_action(neutral, jitter))


def jittered_views(image: Tensor, jitter: Jitter) -> Tensor:
    """Return the image (S, S, 3) uint8 under each jitter: (count, S, S, 3) uint8, on the image's device.

    The affine colour map of DALI's ``color_twist``, rounded and clipped once. Written as three multiplications, not as
    a matmul, which a GPU may run in TF32: ten bits of mantissa are not enough for 256 levels.
    """
    matrix = torch.from_numpy(np.asarray(colour_matrix(jitter), dtype=np.float32)).to(image.device)  # (count, 3, 4)
    level = image.float()[None, :, :, :, None]  # (1, S, S, in, 1)
    weight = matrix[:, None, None]  # (count, 1, 1, out, 4)
    out = weight[..., 3].expand(-1, *image.shape[:2], -1).clone()  # (count, S, S, out)
    for channel in range(3):
        out += level[..., channel, :] * weight[..., channel]
    return out.round_().clamp_(0, 255).to(torch.uint8)
