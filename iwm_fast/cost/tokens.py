"""How many tokens a run's images have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tokens"]


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
