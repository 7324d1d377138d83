"""Convert what Pillow opened to upright 8-bit RGB, or say why there is no right conversion.

Pillow's own `convert("RGB")` clips more than 8 bits: a 16-bit gray image turns white silently. Here 16-bit gray gives
its high byte, as Pillow's 16-bit colour does; 12-bit TIFF its high 8 bits. Floats are read where all lie in [0, 1],
black to white in scikit-image, Matplotlib and torchvision; other floats, and signed and 32-bit integers, have no agreed
range and are rejected. The rest is Pillow's conversion: the stored colours of a transparent pixel, whatever its alpha;
CMYK without a profile; the first of several frames.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["PILLOW_ERRORS", "refusal", "transpose", "upright_rgb"]

# What Pillow raises on damaged files, besides its own UnidentifiedImageError (an OSError); ImportError: a part of
# Pillow that this build lacks.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    ImportError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# Formats whose 16 bits are known to be unsigned and to use their full range; None: an image made in memory.
_UNSIGNED = frozenset({"PNG", "TIFF", "JPEG2000", "IM", None})
# Formats whose 16 bits are Pillow's 32-bit mode "I": PGM is scaled to 65535, whatever its largest value.
_SIXTEEN_IN_THIRTY_TWO = frozenset({"PPM", "PNG"})
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2
_REMEDY = "save it with 8 or 16 unsigned bits per channel"


def refusal(image: Image.Image) -> str | None:
    """Return why an opened image cannot become 8-bit RGB, from its header alone; None where it can."""
    signed = _SIGNED in np.atleast_1d(_tag(image, _SAMPLE_FORMAT, 1))
    if signed or (image.mode in _SIXTEEN_BITS and image.format not in _UNSIGNED):
        return f"its pixels are signed integers, whose black level is unknown; {_REMEDY}"
    if image.mode == "I" and image.format not in _SIXTEEN_IN_THIRTY_TWO:
        return f"its pixels are 32-bit integers, whose white level is unknown; {_REMEDY}"
    return None


def upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the upright image, uint8 (height, width, 3). Raises ValueError with the reason, or Pillow's error."""
    reason = refusal(image)
    if reason is not None:
        raise ValueError(reason)
    # read now: a transposed image loses its format
    bits = int(np.atleast_1d(_tag(image, _BITS, 16))[0])
    inverted = _tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO
    image.load()
    upright = transpose(image)
    if upright.mode in ("F", "I") or upright.mode in _SIXTEEN_BITS:
        values = np.asarray(upright)
        levels = _of_floats(values) if upright.mode == "F" else (values >> (bits - 8)).astype(np.uint8)
        # Pillow inverts such a TIFF of up to 8 bits, and not of more
        return np.repeat((255 - levels if inverted else levels)[..., None], 3, axis=2)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # the same colours; Pillow warns of the direct way
    if upright.mode == "La":
        upright = upright.convert("LA")  # there is no direct way
    return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))


def transpose(image: Image.Image) -> Image.Image:
    """Return the upright image; an unreadable EXIF block gives no orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except PILLOW_ERRORS:
        return image


def _of_floats(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # true of NaN as well
        raise ValueError(f"its pixels are floating-point numbers from {low:g} to {high:g}, not in [0, 1]; {_REMEDY}")
    return np.rint(values * 255).astype(np.uint8)


def _tag(image: Image.Image, tag: int, default: int) -> int | tuple[int, ...]:
    """A TIFF's; the default for other formats."""
    if image.format != "TIFF":
        return default
    value: int | tuple[int, ...] = getattr(image, "tag_v2", {}).get(tag, default)
    return value
