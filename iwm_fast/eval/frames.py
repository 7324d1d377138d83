"""The pictures of triplets as evaluation reads them: whole, at the model's size, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.data.clean import load_clean, whole_image
from iwm_fast.data.triplets import Triplets, find_manifest, read_triplets
from iwm_fast.errors import UserError

__all__ = ["FrameReader", "open_triplets"]


def open_triplets(root: str | Path, config: Config) -> Triplets:
    """The triplets to test on: a manifest, a folder that holds one, or one that holds test/ with one.

    UserError where there is none, or its actions are not those that the run was trained on.
    """
    for place in (Path(root) / "test", Path(root)):
        manifest = find_manifest(place)
        if manifest is not None:
            return read_triplets(manifest, config.actions.external)
    raise UserError(
        f"{root}: the run was trained on triplets, and this is no manifest of them: give a .jsonl or .parquet file, or "
        "a folder that holds manifest.jsonl, manifest.parquet, or test/ with one"
    )


class FrameReader:
    """Pictures of triplets by their place in `frames`; those that cannot be decoded are in ``bad`` with the reason."""

    def __init__(self, triplets: Triplets, config: Config) -> None:
        self.triplets, self.bad = triplets, dict[str, str]()
        self._size, self._data = config.model.image, config.data

    def read(self, frames: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_]]:
        """uint8 (n, S, S, 3) on the CPU, and whether each was decoded, bool (n,); the others are black."""
        needed, place = np.unique(frames, return_inverse=True)
        files = self.triplets.frames.take(needed)
        pictures = torch.zeros(len(needed), self._size, self._size, 3, dtype=torch.uint8)
        good = np.zeros(len(needed), bool)
        for clean in load_clean(
            files,
            self._size,
            device=self._data.device,
            threads=self._data.threads,
            max_pixels=self._data.max_pixels,
            crop=whole_image,
        ):
            pictures[torch.from_numpy(clean.rows)] = clean.images.cpu()
            good[clean.rows] = True
            self.bad |= {files.name(row): reason for row, reason in clean.failed.items()}
        return pictures[torch.from_numpy(place)], good[place]
