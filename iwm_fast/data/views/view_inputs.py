"""The inputs of the graph of the views, by name: bytes, boxes, and every parameter. No DALI here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Jitter, Views
from iwm_fast.data.decode.encoded import Encoded
from iwm_fast.data.decode.exif import Placement, place
from iwm_fast.data.views.cpu_operators import recolour_matrices

__all__ = ["DECODED", "source_names", "view_inputs"]

# The inputs of a decoder, by name.
DECODED = ("encoded", "start", "shape")


def source_names(sources: int) -> tuple[str, ...]:
    """Return the names of an image's K sources."""
    return tuple(f"source{k}" for k in range(sources))


def _union(boxes: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    """The smallest boxes that hold the given ones, each (B, 4) x, y, width, height."""
    start = np.minimum.reduce([box[:, :2] for box in boxes])
    end = np.maximum.reduce([box[:, :2] + box[:, 2:] for box in boxes])
    return np.concatenate([start, end - start], axis=1).astype(np.int32)


def _placement_inputs(placement: Placement, view: str) -> dict[str, Any]:
    """Relative start and end in the order height, width, exchanged where the view is mirrored; and the transpose."""
    start = np.stack([placement.down, placement.across], axis=1).astype(np.float32)
    return {f"{view}_roi_start": start, f"{view}_roi_end": 1 - start, f"{view}_transposed": placement.transposed}


def _jitter_inputs(jitter: Jitter, view: str, *, dali_only: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {f"{view}_jittered": jitter.changed()}
    if not dali_only:
        return inputs | {f"{view}_matrix": recolour_matrices(jitter)}
    return inputs | {f"{view}_{name}": getattr(jitter, name).astype(np.float32) for name in JITTER}


def _source_inputs(views: Views, source: str, corruptions: Collection[str], *, dali_only: bool) -> dict[str, Any]:
    """The jitter, and of each corruption whether a sample has it and, where it can be weak or strong, how much."""
    inputs = _jitter_inputs(views.source, source, dali_only=dali_only)
    for corruption in CORRUPTIONS:
        if corruption.name not in corruptions:
            continue
        column = getattr(views, corruption.column)
        done = inputs[f"{source}_{corruption.name}"] = np.asarray(corruption.done(column))
        if corruption.strength is not None:
            inputs[f"{source}_{corruption.strength}"] = np.where(done, column, 0).astype(corruption.fed)
    return inputs


def _box_inputs(box: NDArray[np.int64], view: str, region: NDArray[np.int32]) -> dict[str, Any]:
    return {f"{view}_start": box[:, :2].astype(np.int32) - region[:, :2], f"{view}_shape": box[:, 2:].astype(np.int32)}


def view_inputs(
    encoded: Sequence[Encoded],
    views: Views,
    *,
    geometric: bool,
    sources: int,
    corruptions: Collection[str],
    dali_only: bool,
) -> dict[str, Any]:
    """What the host feeds for B samples, by name: bytes, boxes, and every parameter of the views.

    views: B · K rows, a sample's K sources side by side; corruptions: names of those that the graph does;
    dali_only: for `build_views`, not for `cpu_views`.
    """
    rows = np.arange(0, len(views), sources)
    parts = {name: views.take(rows + k) for k, name in enumerate(source_names(sources))}
    target = next(iter(parts.values()))
    orientation = [one.orientation for one in encoded]
    placed = {"target": place(target.target_geometry, target.size, orientation)}
    if geometric:
        placed |= {name: place(part.source_geometry, part.size, orientation) for name, part in parts.items()}
    region = _union([placement.box for placement in placed.values()])
    inputs: dict[str, Any] = {"encoded": [one.data for one in encoded], "start": region[:, :2], "shape": region[:, 2:]}
    inputs |= _jitter_inputs(target.target, "target", dali_only=dali_only)
    for name, placement in placed.items():
        inputs |= _placement_inputs(placement, name)
        if geometric:
            inputs |= _box_inputs(placement.box, name, region)
    for name, part in parts.items():
        inputs |= _source_inputs(part, name, corruptions, dali_only=dali_only)
    # DALI takes dense arrays only
    return {name: np.ascontiguousarray(value) if name != "encoded" else value for name, value in inputs.items()}
