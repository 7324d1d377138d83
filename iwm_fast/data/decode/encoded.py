"""Prepare a file for DALI: check its header, and make it something that DALI decodes as Pillow would.

Pillow decides: a user sees the upright RGB image that Pillow decodes (`levels` corrects its conversion), or the reason
why there is none. Plain JPEG and PNG files, which DALI decodes to the same pixels, pass unchanged, with the EXIF
orientation of a JPEG. Pillow decodes everything that DALI decodes differently, or may (CMYK, palettes, alpha, 16 bits,
WebP, turned PNGs, an unusual header, a missing end marker), and passes it on as an uncompressed PNM.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.data.decode.levels import PILLOW_ERRORS, refusal, upright_rgb
from iwm_fast.data.decode.structure import PNG_TURNS, exif_orientation, plain_jpeg, plain_png

__all__ = [
    "MAX_PIXELS",
    "BadSample",
    "Encoded",
    "as_it_is",
    "decode_upright",
    "inspect",
    "reencode",
    "upright_size",
]

MAX_PIXELS = 178_956_970  # data.max_pixels' default, which is Pillow's

_DRAWN = ("EPS", "WMF")  # by Ghostscript, and by Windows
_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_TRANSPOSED = 5  # from this orientation on, width and height are swapped


class BadSample(Exception):  # noqa: N818  (a verdict on a file, not a fault of the program)
    """A file that cannot be decoded; `reason` says why in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image that DALI can decode: data, uint8 (n,), its bytes; width and height of the upright image in pixels.

    orientation: EXIF's number, 1 to 8: how the pixels in data are turned. lossless: data is what Pillow decoded, not
    the file, so the verdict is final.
    """

    data: NDArray[np.uint8]
    width: int
    height: int
    orientation: int = 1
    lossless: bool = False


def upright_size(raw: bytes) -> tuple[int, int]:
    """Return width and height of the upright image from the file's header; BadSample where Pillow cannot read it."""
    image = _open(raw, 2**62)
    try:
        if image.format == "TIFF":  # Pillow's size of a TIFF is the upright one, unless XMP says how it is turned
            width, height = int(image.tag_v2[_WIDTH]), int(image.tag_v2[_HEIGHT])  # type: ignore[attr-defined]
            turn = int(image.getexif().get(_ORIENTATION, 1))
        else:
            if image.format == "PNG" and any(word in raw for word in PNG_TURNS):
                image.load()  # EXIF or XMP may follow the pixels
            width, height = image.size
            turn = _orientation(image)
    except PILLOW_ERRORS as error:
        raise BadSample(_line(error)) from error
    return (height, width) if turn >= _TRANSPOSED else (width, height)


def inspect(raw: bytes, max_pixels: int) -> Encoded:
    """Return a file's bytes, ready for DALI; BadSample where Pillow cannot decode it or it has more than
    `max_pixels`.
    """
    return as_it_is(raw, max_pixels) or reencode(raw, max_pixels)


def as_it_is(raw: bytes, max_pixels: int) -> Encoded | None:
    """Return the bytes of a plain file, None where Pillow has to decode it; BadSample by its header alone, as
    `inspect`.
    """
    image = _open(raw, max_pixels)
    orientation = _turn(image, raw) if _plain(image, raw) else None
    if orientation is None:
        return None
    width, height = image.size if orientation < _TRANSPOSED else image.size[::-1]
    return Encoded(np.frombuffer(raw, np.uint8), width, height, orientation)


def reencode(raw: bytes, max_pixels: int) -> Encoded:
    """Return what Pillow decodes from `raw`, uncompressed; BadSample where it cannot."""
    pixels = decode_upright(raw, max_pixels)
    height, width = pixels.shape[:2]
    data = b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
    return Encoded(np.frombuffer(data, np.uint8), width, height, lossless=True)


def decode_upright(raw: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return the upright RGB image, uint8 (height, width, 3), decoded by Pillow; BadSample where it cannot."""
    image = _open(raw, max_pixels)
    try:
        return upright_rgb(image)
    except PILLOW_ERRORS as error:
        raise BadSample(_line(error)) from error


def _open(raw: bytes, max_pixels: int) -> Image.Image:
    # Pillow's own limit warns of half of data.max_pixels' default, and a raised one is meant.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(raw), formats=_formats())
        reason = refusal(image)
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than twice data.max_pixels ({max_pixels}): {_line(error)}") from error
    except PILLOW_ERRORS as error:
        raise BadSample(_line(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample(f"{width} x {height} pixels: more than data.max_pixels ({max_pixels})")
    if width < 1 or height < 1:
        raise BadSample(f"{width} x {height} pixels: nothing to see")
    if reason is not None:
        raise BadSample(reason)
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats, without those that it has another program draw."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _DRAWN)


def _line(error: BaseException) -> str:
    """One line for a user; Pillow names the buffer in some messages, which is noise."""
    text = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        return "cannot identify image file"
    return text or type(error).__name__


def _plain(image: Image.Image, raw: bytes) -> bool:
    """Whether DALI decodes these bytes as Pillow does, and the file looks complete without decoding it."""
    if image.mode not in {"RGB", "L"} or "transparency" in image.info or image.info.get("adobe_transform") == 0:
        return False  # Adobe's transform 0 in a JPEG: stored as RGB, which nvJPEG does not expect
    if image.format == "JPEG":
        return plain_jpeg(raw)
    return image.format == "PNG" and plain_png(raw)


def _turn(image: Image.Image, raw: bytes) -> int | None:
    """The orientation of a plain file; None where Pillow and a strict reading of a JPEG's EXIF block disagree."""
    stated = _orientation(image)
    if stated == 1 or (image.format == "JPEG" and stated == exif_orientation(raw)):
        return stated
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 0 where its block cannot be read."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except PILLOW_ERRORS:
        return 0
