"""How many tokens a run's images have, drawn from its own masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.config import Config
from iwm_fast.data.masks import MaskSampler

__all__ = ["Tokens", "draw_tokens"]

_IMAGES = 2048  # the mean of their context lengths is then known to about 0.3 % with I-JEPA's masks


@dataclass(frozen=True, eq=False)
class Tokens:
    """context, predicted: int64 (B,), each image's visible patches, and patches to predict."""

    context: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def tiled(self, images: int) -> Tokens:
        """As many images as asked for, these ones over and over."""
        return Tokens(np.resize(self.context, images), np.resize(self.predicted, images))


def draw_tokens(config: Config, images: int = _IMAGES) -> Tokens:
    """The token counts of the run's first images; the mlp predictor answers for the context's own patches."""
    exclude = "geometric" not in config.actions.groups
    sampler = MaskSampler(config.masks, config.model.grid, config.train.seed, exclude=exclude)
    patches = sampler.draw(np.zeros(images, np.int64), np.arange(images, dtype=np.int64))
    own = config.model.predictor.kind == "mlp"
    return Tokens(patches.context_lengths, patches.context_lengths if own else patches.target_lengths)
