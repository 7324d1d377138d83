"""What the host feeds the graph of the views, by name: bytes, boxes, and every parameter. No DALI here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.transforms import Jitter, Views
from iwm_fast.data.decode.encoded import Encoded
from iwm_fast.data.decode.exif import Placement, place
from iwm_fast.data.views.cpu_operators import recolour_matrices

__all__ = ["DECODED", "JITTER", "source_names", "view_inputs"]

# What a decoder is fed, by name.
DECODED = ("encoded", "start", "shape")
JITTER = ("brightness", "contrast", "saturation", "hue")


def source_names(sources: int) -> tuple[str, ...]:
    """The names of an image's K sources."""
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
    jittered = (jitter.brightness != 1) | (jitter.contrast != 1) | (jitter.saturation != 1) | (jitter.hue != 0)
    inputs: dict[str, Any] = {f"{view}_jittered": jittered}
    if not dali_only:
        return inputs | {f"{view}_matrix": recolour_matrices(jitter)}
    return inputs | {f"{view}_{name}": getattr(jitter, name).astype(np.float32) for name in JITTER}


def _source_inputs(views: Views, source: str, *, dali_only: bool) -> dict[str, Any]:
    return _jitter_inputs(views.source, source, dali_only=dali_only) | {
        f"{source}_grayscale": views.grayscale.astype(bool),
        f"{source}_blurred": views.blur_sigma > 0,
        f"{source}_blur_sigma": views.blur_sigma.astype(np.float32),
        f"{source}_solarized": views.solarize_threshold < 256,
        f"{source}_solarize_threshold": np.minimum(views.solarize_threshold, 255).astype(np.uint8),
    }


def _box_inputs(box: NDArray[np.int64], view: str, region: NDArray[np.int32]) -> dict[str, Any]:
    return {f"{view}_start": box[:, :2].astype(np.int32) - region[:, :2], f"{view}_shape": box[:, 2:].astype(np.int32)}


def view_inputs(
    encoded: Sequence[Encoded], views: Views, *, geometric: bool, sources: int, dali_only: bool
) -> dict[str, Any]:
    """What the host feeds for B samples, by name: bytes, boxes, and every parameter of the views.

    views: B · K rows, a sample's K sources side by side; dali_only: for `build_views`, not for `cpu_views`.
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
        inputs |= _source_inputs(part, name, dali_only=dali_only)
    # DALI takes dense arrays only
    return {name: np.ascontiguousarray(value) if name != "encoded" else value for name, value in inputs.items()}
