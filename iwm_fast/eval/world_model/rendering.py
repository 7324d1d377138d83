"""Views of clean images under any parameters, rendered by training's operators."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from torch import Tensor

from iwm_fast.actions.transforms import Views
from iwm_fast.data.decode.encoded import Encoded
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.environment import usable_cores

__all__ = ["clean_views", "render"]

_CHUNK = 128
_THREADS = 8  # a graph lives for one call only, and starting threads takes time


def clean_views(side: int, count: int) -> Views:
    """Return ``count`` views of a whole image of ``side`` × ``side`` pixels, without any transformation."""
    whole = np.tile(np.array([0, 0, side, side]), (count, 1))
    return Views.neutral(np.full((count, 2), side), whole)


def render(images: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    """Return sources and targets, uint8 (n, S, S, 3) each, on the CPU: row i of ``views`` applied to image i.

    ``images``: uint8 (n, S, S, 3), or one image (1, S, S, 3) for all rows. Raise ValueError for another number.
    """
    if len(images) not in (1, len(views)):
        raise ValueError(f"images has {len(images)} rows; it must have 1 or {len(views)}, as views has")
    alone = dataclasses.replace(views, shared_geometry=False)
    encoded = [_encoded(image) for image in images]
    encoded *= len(views) // len(encoded)
    chunk = min(_CHUNK, len(views))
    graph = ViewGraph(images.shape[1], chunk, "cpu", min(chunk, usable_cores(), _THREADS), geometric=True)
    parts = []
    with contextlib.closing(graph):
        for first in range(0, len(views), chunk):
            rows = np.arange(first, min(first + chunk, len(views)))
            parts.append(graph.run(encoded[first : first + chunk], alone.take(rows)))
        return torch.cat([part.source for part in parts]), torch.cat([part.target for part in parts])


def _encoded(image: Tensor) -> Encoded:
    """Encode as a PPM, which is lossless."""
    pixels = image.cpu().numpy()
    height, width = pixels.shape[:2]
    data = b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
    return Encoded(np.frombuffer(data, np.uint8), width, height, lossless=True)
