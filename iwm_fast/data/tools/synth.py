"""A labelled set of generated JPEGs, for a first run without data and for tests.

A class is a shape and its filling. Everything else is sampled for each image from the same distributions for all
classes: both colours, the background's gradient and ripples, place, size, angle, the light's direction and strength,
shadow and noise. So neither mean colour nor position predicts the class, while colour has enough structure to make a
photometric action visible.

Legend: B images, side S in pixels; coordinates run from -1 to 1 over the image, y downwards.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.atomic_files import whole_folder
from iwm_fast.errors import UserError, because
from iwm_fast.outputs import require_folder

__all__ = ["CLASSES", "draw_dataset", "draw_images"]

CLASSES = (
    "disc_smooth",
    "square_striped",
    "triangle_smooth",
    "ring_striped",
    "disc_striped",
    "square_smooth",
    "triangle_striped",
    "ring_smooth",
)
_QUALITY = 90
_CHUNK = 64  # images generated at once: 3 MB per intermediate at 64 pixels
_SPLITS = ("train", "test")
_RECORD = "synth.json"

Floats = NDArray[np.float32]


def draw_dataset(
    out: Path,
    *,
    classes: int = 8,
    train: int = 4096,
    test: int = 800,
    size: int = 64,
    seed: int = 0,
    segments: bool = False,
) -> None:
    """Write `train` and `test` images of size × size to out/train/CLASS/NNNNN.jpg and out/test/….

    segments: to out/train/images/NNNNN.jpg instead, with the shape's mask in out/train/masks/NNNNN.png: 0 is the
    background, else 1 + the class's index in CLASSES.
    The folder is renamed into place when complete; if it already has exactly this set, nothing is written. Reproducible
    from the seed. Raises UserError if `out` has other files or cannot be written, ValueError for a number out of range.
    """
    if not 2 <= classes <= len(CLASSES):
        raise ValueError(f"classes is {classes}; it must be 2 to {len(CLASSES)}")
    if train < 1 or test < 1 or size < 16:
        raise ValueError(f"train is {train}, test {test} and size {size}; they must be at least 1, 1 and 16")
    record: dict[str, object] = {"classes": list(CLASSES[:classes]), "train": train, "test": test, "size": size}
    record |= {"seed": seed} | ({"segments": True} if segments else {})
    if _is_drawn(out, record):
        return
    require_folder(out.parent)
    try:
        with whole_folder(out) as partial:
            _write(partial, record)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error


def draw_images(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one image for each label (B,), an index in CLASSES: uint8 (B, S, S, 3)."""
    return _draw(labels, size, rng)[0]


def _draw(
    labels: NDArray[np.int64], size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return images (B, S, S, 3), and where the shape covers at least half of a pixel (B, S, S)."""
    count = len(labels)
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x = np.broadcast_to(line[None, None, :], (count, size, size))
    y = np.broadcast_to(line[None, :, None], (count, size, size))
    back, front = _colours(count, rng)
    canvas = _background(x, y, back, rng)
    place = rng.uniform(-0.35, 0.35, (2, count, 1, 1)).astype(np.float32)
    scale = rng.uniform(0.4, 0.62, (count, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    offset = rng.uniform(0.03, 0.12, (2, count, 1, 1)).astype(np.float32)
    shadow = _coverage(labels, x - place[0] - offset[0], y - place[1] - offset[1], scale, angle, size)
    canvas *= (1 - rng.uniform(0.15, 0.5, (count, 1, 1)).astype(np.float32) * shadow)[..., None]
    u, v = x - place[0], y - place[1]
    inside = _coverage(labels, u, v, scale, angle, size)[..., None]
    canvas += inside * (_filling(labels, u, v, scale, front, rng) - canvas)
    canvas *= _light(x, y, rng)[..., None]
    canvas += rng.normal(0, 0.012, canvas.shape).astype(np.float32)
    return np.asarray(np.clip(canvas * 255 + 0.5, 0, 255), np.uint8), inside[..., 0] >= 0.5


def _is_drawn(out: Path, record: dict[str, object]) -> bool:
    """Return whether exactly this set exists. Raise UserError if `out` has anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    try:
        if json.loads((out / _RECORD).read_text(encoding="utf-8")) == record:
            return True
    except (OSError, ValueError):
        pass
    if any(out.iterdir()):
        raise UserError(f"{out} holds other files already; choose another --out, or remove it")
    return False


def _write(folder: Path, record: dict[str, object]) -> None:
    seed, size, names = record["seed"], record["size"], record["classes"]
    assert isinstance(seed, int)
    assert isinstance(size, int)
    assert isinstance(names, list)
    for part, split in enumerate(_SPLITS):
        total = record[split]
        assert isinstance(total, int)
        for name in ("images", "masks") if "segments" in record else names:
            (folder / split / name).mkdir(parents=True)
        for first in range(0, total, _CHUNK):
            numbers = np.arange(first, min(first + _CHUNK, total))
            labels = numbers % len(names)
            pixels, inside = _draw(labels, size, np.random.default_rng((seed, part, first)))
            for row, (number, label) in enumerate(zip(numbers.tolist(), labels.tolist(), strict=True)):
                kind = "images" if "segments" in record else names[label]
                Image.fromarray(pixels[row]).save(folder / split / kind / f"{number:05d}.jpg", quality=_QUALITY)
                if "segments" in record:
                    mask = Image.fromarray(((1 + label) * inside[row]).astype(np.uint8))
                    mask.save(folder / split / "masks" / f"{number:05d}.png")
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")


def _colours(count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Sample two background and two foreground colours, (B, 2, 3) in 0 to 1; their means differ clearly."""
    back = rng.uniform(0.05, 0.95, (count, 3))
    away = rng.normal(size=(count, 3))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    front = back + away * rng.uniform(0.5, 0.8, (count, 1))
    # a colour outside the cube is mirrored at the background
    front = np.where((front < 0) | (front > 1), back - (front - back), front)
    pairs = np.clip(np.stack([back, front])[:, :, None, :] + rng.normal(0, 0.12, (2, count, 2, 3)), 0, 1)
    return pairs[0].astype(np.float32), pairs[1].astype(np.float32)


def _background(x: Floats, y: Floats, colours: Floats, rng: np.random.Generator) -> Floats:
    """Return a gradient between two colours in a random direction, with two long waves: (B, S, S, 3)."""
    count = len(x)
    mix = np.full(x.shape, 0.5, np.float32)
    for strength, low, high in ((0.35, 0.0, 0.0), (0.18, 2.0, 5.0), (0.12, 3.0, 8.0)):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
        along = np.cos(angle) * x + np.sin(angle) * y
        frequency = rng.uniform(low, high, (count, 1, 1)).astype(np.float32)
        mix += strength * (np.sin(frequency * along + phase) if high else along)
    mix = np.clip(mix, 0, 1)[..., None]
    near, far = colours[:, 0, None, None, :], colours[:, 1, None, None, :]
    return np.asarray(near + mix * (far - near), np.float32)


def _coverage(labels: NDArray[np.int64], u: Floats, v: Floats, scale: Floats, angle: Floats, size: int) -> Floats:
    """Return how much of each pixel the shape covers, (B, S, S) in 0 to 1; u, v from the shape's centre."""
    a = (np.cos(angle) * u + np.sin(angle) * v) / scale
    b = (np.cos(angle) * v - np.sin(angle) * u) / scale
    distance = np.empty_like(a)  # to the outline, in units of the scale, negative inside
    shapes = np.array([CLASSES[label].split("_")[0] for label in labels])
    radius = np.hypot(a, b)
    for shape in np.unique(shapes):
        rows = shapes == shape
        if shape == "disc":
            distance[rows] = radius[rows] - 0.9
        elif shape == "ring":
            distance[rows] = np.abs(radius[rows] - 0.75) - 0.25
        elif shape == "square":
            distance[rows] = np.maximum(np.abs(a[rows]), np.abs(b[rows])) - 0.8
        else:  # triangle, equilateral: three half-planes
            half = 0.5 * b[rows]
            sides = (b[rows], -half + 0.866 * a[rows], -half - 0.866 * a[rows])
            distance[rows] = np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - 0.58
    return np.asarray(np.clip(0.5 - distance * scale * (size / 2), 0, 1), np.float32)


def _filling(
    labels: NDArray[np.int64], u: Floats, v: Floats, scale: Floats, colours: Floats, rng: np.random.Generator
) -> Floats:
    """Return the shape's filling, (B, S, S, 3): a soft gradient, or stripes of two colours."""
    count = len(u)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
    along = (np.cos(angle) * u + np.sin(angle) * v) / scale
    frequency = rng.uniform(9, 14, (count, 1, 1)).astype(np.float32)
    striped = np.array(["striped" in CLASSES[label] for label in labels])[:, None, None]
    waves = np.where(striped, np.clip(0.5 + 1.5 * np.sin(frequency * along + phase), 0, 1), 0.5 + 0.4 * along)
    one, other = colours[:, 0, None, None, :], colours[:, 1, None, None, :]
    # stripes darken or brighten by a third on top of their colours, so that they show when both colours are alike
    contrast = np.where(striped, 1 + 0.33 * (waves - 0.5), 1 + 0.1 * (waves - 0.5))[..., None]
    return np.asarray((one + np.clip(waves, 0, 1)[..., None] * (other - one)) * contrast, np.float32)


def _light(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """Return the brightness of the light at each pixel, (B, S, S): a random strength with a slope across the image."""
    count = len(x)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    strength, slope = rng.uniform((0.75,), (1.15,), (count, 1, 1)), rng.uniform(0, 0.3, (count, 1, 1))
    return np.asarray(strength * (1 + slope * (np.cos(angle) * x + np.sin(angle) * y)), np.float32)
