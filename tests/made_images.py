"""Small images and files for tests: smooth and colourful, and every kind of odd or broken file, made with Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(width, height, seed=0):
    """Return smooth waves in three channels with a bright box and a little grain: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(3, 12) * (x * np.cos(a) + y * np.sin(a)) + a) for a in rng.uniform(0, 6, 3)]
    image = 127 + 100 * np.stack(waves, axis=2) + rng.normal(0, 4, (height, width, 3))
    image[height // 4 : height // 2, width // 3 : width // 2] = rng.uniform(0, 255, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    """Return the file's bytes; image: an array or a Pillow image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if kind == "JPEG":
        options.setdefault("quality", 95)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image, orientation, kind="JPEG"):
    """Return a file with this EXIF `orientation`."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def write_images(folder: Path, count, *, size=(40, 30), first=0):
    """Write `count` JPEGs NNN.jpg of slightly different sizes; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(first, first + count):
        path = folder / f"{number:03d}.jpg"
        path.write_bytes(encode(picture(size[0] + number % 7, size[1] + number % 5, number)))
        paths.append(path)
    return paths


def broken_tables(raw):
    """Return a JPEG with a correct header and broken Huffman tables: only a decoder notices."""
    at = raw.index(b"\xff\xc4") + 5
    return raw[:at] + b"\xff" * 16 + raw[at + 16 :]


def png_chunk(kind, body=b""):
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(levels, depth, colour, *before):
    """Return a PNG of `levels` (h, w) or (h, w, channels) in `depth` bits; colour: its type; chunks: before pixels."""
    levels = np.asarray(levels).reshape(len(levels), -1)
    rows = [np.packbits(_bits(row, depth)).tobytes() for row in levels]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", levels.shape[1] // channels, len(levels), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [png_chunk(b"IHDR", header), *before, png_chunk(b"IDAT", pixels), png_chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values, bits, photometric, *, sample_format=1, order="<", extra=()):
    """Return an uncompressed TIFF of `values` (h, w) or (h, w, channels), in their dtype or as integers of `bits`."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    if bits % 8:
        data = b"".join(np.packbits(_bits(row, bits)).tobytes() for row in values.reshape(height, -1))
    else:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    # BitsPerSample and SampleFormat of each channel, all SHORT
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [8]}
    tags |= {277: [channels], 278: [height], 279: [len(data)], 339: [sample_format] * channels}
    tags |= {338: list(extra)} if extra else {}
    at = 8 + len(data) + len(data) % 2
    behind, entries = b"", b""
    for tag in sorted(tags):
        value = struct.pack(f"{order}{len(tags[tag])}H", *tags[tag])
        if len(value) > 4:
            place = at + 2 + 12 * len(tags) + 4 + len(behind)
            behind, value = behind + value, struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, 3, len(tags[tag])) + value.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(order + "I", at) + data.ljust(at - 8, b"\0") + directory + behind


def _bits(row, depth):
    """Return the bits of integers, the highest first."""
    return (np.asarray(row, np.int64)[:, None] >> np.arange(depth - 1, -1, -1)) & 1
