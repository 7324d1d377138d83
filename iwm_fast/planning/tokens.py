"""How many tokens a run's images have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tokens"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """context, predicted: int64 (B,), each image's visible patches, and patches to predict."""

    context: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def tiled(self, images: int) -> Tokens:
        """As many images as asked for, these ones over and over."""
        return Tokens(np.resize(self.context, images), np.resize(self.predicted, images))
