"""Sample the augmentations of each image: crops, flips, jitter and corruptions, before any pixel is read.

Every value is a function of (seed, epoch, sample id), so the same tensor goes to the operators and into the action.
Each quantity has a fixed place in its stream: changing a probability never changes another quantity. Sources: the
recipe of arXiv:2403.00504; the crop is torchvision's `RandomResizedCrop.get_params` (ten attempts, then a centred
fallback), the jitter's ranges are those of torchvision's `ColorJitter`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.ranges import corruptions_drawn, jitter_range
from iwm_fast.actions.transforms import JITTER, Geometry, Jitter, Views, component
from iwm_fast.config.schema import ActionsConfig
from iwm_fast.data.randomness import BANK, COMPRESSION, SOURCE_GEOMETRY, VIEWS, uniforms
from iwm_fast.errors import UserError

__all__ = ["draw_bank", "draw_views"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ATTEMPTS = 10
# Places in a geometry's stream: area and aspect of each attempt, then x, y, flip, rotated or not, turns.
_POSITION, _FLIP, _ROTATED, _TURNS = 20, 22, 23, 24
_GEOMETRY = 26
# Places in the VIEWS stream after the target's geometry: its jitter (applied, b, c, s, h), then each source's jitter
# and corruptions. The first source has 31 to 39, the others ten each.
_TARGET, _SOURCE = 26, 31
_GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = 5, 6, 7, 8
_SOURCE_DRAWS, _VIEWS = 10, 40
# Attempts to resample equal rows of a bank. float32 factors of the usual strengths collide once in 2⁶⁰; more than a few
# rounds mean that the strengths allow fewer distinct values than requested.
_BANK_ROUNDS = 32


def draw_views(actions: ActionsConfig, seed: int, epoch: Ints, sample: Ints, size: Ints, *, sources: int = 1) -> Views:
    """Sample the views of B samples, each with one target and `sources` = K sources: B · K rows, a sample's adjacent.

    epoch and sample: int64 (B,); size: int64 (B, 2), width and height of the upright images in pixels (ValueError
    unless each is at least 1). A sample's first source does not depend on K.
    """
    size = np.asarray(size, np.int64)
    if size.ndim != 2 or size.shape[1] != 2 or (size < 1).any():
        raise ValueError(f"size has shape {size.shape}; it must be (B, 2), each width and height at least 1")
    draws = uniforms(seed, epoch, sample, VIEWS, _VIEWS + _SOURCE_DRAWS * (sources - 1))
    geometry = _geometry(actions, draws, size, rotate=False)
    target = _jitter(actions, draws[:, _TARGET:])
    compression = None
    if "compression" in actions.groups:
        compression = uniforms(seed, epoch, sample, COMPRESSION, 2 * sources)
    parts = []
    for k in range(sources):
        own = draws[:, _SOURCE:] if k == 0 else draws[:, _VIEWS + _SOURCE_DRAWS * (k - 1) :]
        source_geometry = geometry
        if actions.geometric:
            places = uniforms(seed, epoch, sample, SOURCE_GEOMETRY, _GEOMETRY, start=_GEOMETRY * k)
            source_geometry = _geometry(actions, places, size, rotate=True)
        jitter = _jitter(actions, own)
        shared = source_geometry is geometry
        corrupted = _corrupted(actions, own, None if compression is None else compression[:, 2 * k :])
        parts.append(Views(size, geometry, source_geometry, target, jitter, shared, **corrupted))
    if sources == 1:
        return parts[0]
    side_by_side = np.arange(len(size) * sources).reshape(sources, len(size)).T.reshape(-1)
    return Views.concatenate(parts).take(side_by_side)


def _corrupted(actions: ActionsConfig, own: Floats, compression: Floats | None) -> dict[str, NDArray[Any]]:
    """The columns of the corruptions, from random numbers (B, 9 or more).

    ``compression``: (B, 2 or more), its own random numbers, where images can be compressed.
    """
    low, high = actions.blur_sigma
    sigma = np.maximum(low + (high - low) * own[:, _SIGMA], np.finfo(np.float32).tiny)
    drawn: dict[str, tuple[Floats, Any]] = {
        "grayscale": (own[:, _GRAYSCALE], True),
        "blur": (own[:, _BLUR], sigma),
        "solarize": (own[:, _SOLARIZE], actions.solarize_threshold),
    }
    if compression is not None:
        lowest, highest = actions.compression_quality
        drawn["compression"] = (compression[:, 0], np.floor(lowest + (highest + 1 - lowest) * compression[:, 1]))
    columns = {}
    for corruption in corruptions_drawn(actions):
        chance, strength = drawn[corruption.name]
        done = chance < getattr(actions, f"{corruption.name}_probability")
        columns[corruption.column] = np.where(done, strength, corruption.none).astype(corruption.dtype)
    return columns


def draw_bank(actions: ActionsConfig, seed: int, sample: int, count: int) -> Jitter:
    """Sample a bank of `count` distinct jitters for an image, always applied, with the configured strengths.

    Raises UserError where the strengths allow fewer distinct ones (all are 0, say).
    """
    width = len(JITTER)
    rows = np.empty((count, width), np.float32)
    missing = np.arange(count)
    for start in range(0, width * count * _BANK_ROUNDS, width * count):
        draws = uniforms(seed, 0, sample, BANK, width * count, start=start).reshape(count, width)
        jitter = _factors(actions, draws[: len(missing)], np.ones(len(missing), bool))
        rows[missing] = np.stack([getattr(jitter, name) for name in JITTER], axis=1)
        first = np.unique(rows, axis=0, return_index=True)[1]
        missing = np.setdiff1d(np.arange(count), first)
        if not len(missing):
            return Jitter(*np.ascontiguousarray(rows.T))
    raise UserError(
        f"actions: the jitter allows fewer than {count} distinct actions for a bank (strength {actions.strength:g}); "
        f"raise actions.strength, or one of actions.{', '.join(JITTER)}, above 0"
    )


def _jitter(actions: ActionsConfig, draws: Floats) -> Jitter:
    """Jitter with its probability, from random numbers (B, 5 or more)."""
    return _factors(actions, draws[:, 1:], draws[:, 0] < actions.jitter_probability)


def _factors(actions: ActionsConfig, draws: Floats, applied: NDArray[np.bool_]) -> Jitter:
    """Factors and hue from random numbers (B, 4 or more), neutral where not applied."""
    values = []
    for draw, name in zip(draws.T, JITTER, strict=False):
        low, high = jitter_range(actions, name)
        value = high * (2.0 * draw - 1.0) if low == -high else low + (high - low) * draw
        values.append(np.where(applied, value, component(name).neutral).astype(np.float32))
    return Jitter(*values)


def _geometry(actions: ActionsConfig, draws: Floats, size: Ints, *, rotate: bool) -> Geometry:
    """Crop and flip, and quarter turns if requested, from random numbers (B, 26 or more)."""
    turns = 1 + (3 * draws[:, _TURNS]).astype(np.int64)
    rotated = (draws[:, _ROTATED] < actions.rotation_probability) & rotate
    return Geometry(
        crop=_crop(actions, draws, size),
        flip=draws[:, _FLIP] < actions.flip_probability,
        rotation=np.where(rotated, turns, 0),
    )


def _crop(actions: ActionsConfig, draws: Floats, size: Ints) -> Ints:
    """Random resized crop: int64 (B, 4) x, y, width, height, inside the image and at least 1 pixel each way."""
    area = np.prod(size.astype(np.float64), axis=1, keepdims=True)
    low, high = actions.crop_scale
    area = area * (low + (high - low) * draws[:, :_ATTEMPTS])  # (B, attempts)
    narrow, wide = np.log(actions.crop_aspect)
    aspect = np.exp(narrow + (wide - narrow) * draws[:, _ATTEMPTS : 2 * _ATTEMPTS])
    boxes = np.rint(np.sqrt(np.stack([area * aspect, area / aspect], axis=2))).astype(np.int64)  # (B, attempts, 2)
    fits = ((boxes > 0) & (boxes <= size[:, None, :])).all(axis=2)
    first = fits.argmax(axis=1)
    found = fits.any(axis=1)[:, None]
    box = np.where(found, boxes[np.arange(len(size)), first], _fallback(actions, size))
    free = size - box
    drawn = (draws[:, _POSITION : _POSITION + 2] * (free + 1)).astype(np.int64)
    corner = np.where(found, drawn, free // 2)
    return np.concatenate([corner, box], axis=1)


def _fallback(actions: ActionsConfig, size: Ints) -> Ints:
    """The largest box of an allowed aspect, for images too long or too high for any attempt: int64 (B, 2)."""
    width, height = size.T
    narrow, wide = actions.crop_aspect
    fitted_height = np.where(width < narrow * height, np.rint(width / narrow).astype(np.int64), height)
    fitted_width = np.where(width > wide * height, np.rint(height * wide).astype(np.int64), width)
    return np.asarray(np.clip(np.stack([fitted_width, fitted_height], axis=1), 1, size), np.int64)
