"""CRC-32C, of TFRecord files and of the images in a manifest."""

from __future__ import annotations

import google_crc32c

__all__ = ["crc32c", "masked_crc32c"]

_MASK_DELTA = 0xA282EAD8  # of TFRecord: a CRC of data that holds CRCs would be weak


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC, 32 bits (100 KB in 4 µs on one core, so it is checked at every read)."""
    return int(google_crc32c.value(data))


def masked_crc32c(data: bytes) -> int:
    """Return the CRC as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
