"""Images from a .npz file: ``images``, uint8 (N, H, W, 3), and ``labels``, one number per image."""

import hashlib
from pathlib import Path

import numpy as np

from iwm_fast.data.sources import register_source


@register_source("npz")
class NpzImages:
    """All images in memory. ``version`` changes with the file, so that features of other images are not reused."""

    def __init__(self, root: str) -> None:
        with np.load(root) as file:
            self._images, self.labels = file["images"], file["labels"].tolist()
        self.version = hashlib.sha256(Path(root).read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._images[index]
