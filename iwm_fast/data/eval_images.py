"""Clean views for evaluation: the centred largest square of each image, resized, without augmentation.

Or the whole image, squeezed into the square, as triplets are trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.transforms import Views
from iwm_fast.data.decode.encoded import MAX_PIXELS, BadSample, Encoded
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.samples import FileStore
from iwm_fast.data.views.devices import dali_device, dali_threads
from iwm_fast.data.views.graph import BadRows, ViewGraph

__all__ = ["CleanImages", "centred_square", "load_clean", "whole_image"]

Crop = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # sizes (B, 2) to boxes (B, 4)


@dataclass(frozen=True, eq=False)
class CleanImages:
    """images: uint8 (b, S, S, 3) on DALI's device; rows: int64 (b,), their indices in the request, ascending; failed:
    reasons by row of this batch's files that cannot be decoded, which have no place in `images`.
    """

    images: Tensor
    rows: NDArray[np.int64]
    failed: dict[int, str]


@dataclass
class _Group:
    rows: list[int]
    encoded: list[Encoded]
    failed: dict[int, str]


def centred_square(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the largest square in the middle of images of `size` (B, 2): int64 (B, 4), x, y, width, height."""
    side = size.min(axis=1, keepdims=True)
    return np.concatenate([(size - side) // 2, side, side], axis=1)


def whole_image(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the whole of images of `size` (B, 2): int64 (B, 4), x, y, width, height."""
    return np.concatenate([np.zeros_like(size), size], axis=1)


def load_clean(
    images: ImageSet,
    size: int,
    *,
    device: str = "cpu",
    threads: int | None = None,
    batch: int = 64,
    max_pixels: int = MAX_PIXELS,
    crop: Crop = centred_square,
    wait_s: float = 0.0,
    readers: int | None = None,
    hw_decoder_load: float = 0.65,
) -> Iterator[CleanImages]:
    """Yield the images in order, `batch` files at a time; a batch holds fewer images where files fail, or none.

    device: data.device, "auto", "cpu" or "gpu"; threads: DALI's, None for its share of the cores; crop: the box of each
    image; wait_s, readers, hw_decoder_load: as in the section data.
    """
    graph = ViewGraph(
        size,
        batch,
        dali_device(device),
        dali_threads(threads),
        geometric=False,
        corruptions=(),
        max_pixels=max_pixels,
        hw_decoder_load=hw_decoder_load,
    )
    store = FileStore(images, max_pixels, wait_s, readers=readers, keep=False)
    underway: deque[_Group] = deque()
    try:
        for first in range(0, len(images), batch):
            group = _read(store, list(range(first, min(first + batch, len(images)))))
            if group.rows:
                graph.submit(group.encoded, _views(group.encoded, crop))
            underway.append(group)
            if len(underway) == 2:  # DALI decodes one batch while the next is read
                yield _collect(graph, underway.popleft(), crop)
        while underway:
            yield _collect(graph, underway.popleft(), crop)
    finally:
        store.close()
        graph.close()


def _read(store: FileStore, rows: list[int]) -> _Group:
    group = _Group([], [], {})
    store.ask(rows)
    for row in rows:
        try:
            group.encoded.append(store.get(row))
            group.rows.append(row)
        except BadSample as bad:
            group.failed[row] = bad.reason
    return group


def _views(encoded: list[Encoded], crop: Crop) -> Views:
    size = np.array([(one.width, one.height) for one in encoded], np.int64)
    return Views.neutral(size, crop(size))


def _collect(graph: ViewGraph, group: _Group, crop: Crop) -> CleanImages:
    while group.rows:
        try:
            images = graph.collect().base
        except BadRows as bad:
            group.failed |= {group.rows[row]: reason for row, reason in bad.reasons.items()}
            kept = [row for row in range(len(group.rows)) if row not in bad.reasons]
            group.rows = [group.rows[row] for row in kept]
            group.encoded = [group.encoded[row] for row in kept]
            if kept:
                graph.replace(group.encoded, _views(group.encoded, crop))
            else:
                graph.drop()
        else:
            return CleanImages(images, np.array(group.rows, np.int64), group.failed)
    return CleanImages(graph.nothing(), np.zeros(0, np.int64), group.failed)
