"""Small images and files for tests: smooth and colourful, and every kind of odd or broken file, made with Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(width, height, seed=0):
    """Smooth waves in three channels with a bright box and a little grain: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(3, 12) * (x * np.cos(a) + y * np.sin(a)) + a) for a in rng.uniform(0, 6, 3)]
    image = 127 + 100 * np.stack(waves, axis=2) + rng.normal(0, 4, (height, width, 3))
    image[height // 4 : height // 2, width // 3 : width // 2] = rng.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    """The file's bytes; image: an array or a Pillow image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if kind == "JPEG":
        options.setdefault("quality", 95)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image, orientation, kind="JPEG"):
    """A file whose EXIF block says `orientation`."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def write_images(folder: Path, count, *, size=(40, 30), first=0):
    """`count` JPEGs NNN.jpg of slightly different sizes; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, first + count):
        path = folder / f"{number:03d}.jpg"
        path.write_bytes(encode(picture(size[0] + number % 7, size[1] + number % 5, number)))
        paths.append(path)
    return paths


def broken_tables(raw):
    """A JPEG whose header is in order and whose Huffman tables are not: only a decoder notices."""
    at = raw.index(b"\xff\xc4") + 5
    return raw[:at] + b"\xff" * 16 + raw[at + 16 :]
