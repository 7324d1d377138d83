"""How many tokens a run's images have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iwm_fast.config import Config
from iwm_fast.data.masks import mask_sampler

__all__ = ["Tokens", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """context, predicted: int64 (B · K,), each source's visible patches, and patches to predict.

    sources: K, of each of the B images, side by side.
    """

    context: NDArray[np.int64]
    predicted: NDArray[np.int64]
    sources: int = 1

    @property
    def images(self) -> int:
        """B."""
        return len(self.context) // self.sources

    def tiled(self, images: int) -> Tokens:
        """As many images as asked for, these ones over and over."""
        rows = images * self.sources
        return Tokens(np.resize(self.context, rows), np.resize(self.predicted, rows), self.sources)


def tokens_of(config: Config, images: int) -> Tokens:
    """How many tokens each source of the run's first images has, by the masks that training draws."""
    patches = mask_sampler(config).draw(np.zeros(images, np.int64), np.arange(images, dtype=np.int64))
    own = config.model.predictor.kind == "mlp"  # it predicts the context's own patches
    return Tokens(
        patches.context_lengths,
        patches.context_lengths if own else patches.target_lengths,
        config.views.sources_per_target,
    )
