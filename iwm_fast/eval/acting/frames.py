"""A game's pictures as the model sees them, and the recorded frames nearest to what it predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.transforms import Views
from iwm_fast.config import DataConfig
from iwm_fast.data.decode.encoded import Encoded
from iwm_fast.data.eval_images import whole_image
from iwm_fast.data.triplets import Triplets
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.eval.world_model.distances import euclidean
from iwm_fast.eval.world_model.frames import encode_frames
from iwm_fast.models.iwm import IWM

__all__ = ["Neighbours", "Resizer", "find_neighbours", "spread"]


class Resizer:
    """Pictures of a game at the model's size, resized as training and evaluation resize recorded files."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._graph: ViewGraph | None = None

    def close(self) -> None:
        """End the threads."""
        if self._graph is not None:
            self._graph.close()

    def __call__(self, picture: NDArray[np.uint8]) -> Tensor:
        """Return uint8 (1, S, S, 3) on the CPU of a picture (height, width, 3); unchanged where it has the size."""
        if picture.shape == (self.size, self.size, 3):
            return torch.from_numpy(np.array(picture))[None]
        if self._graph is None:
            self._graph = ViewGraph(self.size, 1, "cpu", 1, geometric=False, corruptions=())
        height, width = picture.shape[:2]
        data = b"P6\n%d %d\n255\n" % (width, height) + picture.tobytes()
        encoded = Encoded(np.frombuffer(data, np.uint8), width, height, lossless=True)
        shape = np.array([(width, height)], np.int64)
        return self._graph.run([encoded], Views.neutral(shape, whole_image(shape))).base.cpu().clone()


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of 0 … count − 1, spread evenly, both ends among them."""
    return [int(place) for place in np.linspace(0, count - 1, min(count, most)).round()]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Recorded frames, uint8 (n, S, S, 3), and their target representations, float32 (n, L · D)."""

    frames: Tensor
    points: Tensor

    def nearest(self, representations: Tensor) -> list[NDArray[np.uint8]]:
        """Return the recorded frame nearest, by L2 over all tokens, to each of (m, L, D)."""
        far = euclidean(representations.float().flatten(1).to(self.points.device), self.points)
        return [self.frames[int(place)].numpy() for place in far.argmin(dim=1)]


def find_neighbours(model: IWM, data: DataConfig, triplets: Triplets, count: int) -> Neighbours:
    """Return at most `count` recorded frames, as `encode_frames`."""
    _, frames, points = encode_frames(model, data, triplets, count)
    return Neighbours(frames, points)
