"""Walks the segments of JPEG and the chunks of PNG files: is the file plain and whole enough to be given to DALI?

This is a matter of survival, not only of the right pixels. A file that fails in DALI's decoder raises an error, but one
that its *parser* refuses (nvImageCodec's src/parsers, release 0.8, in DALI 2.4) can crash the process: the error leaves
the operator while its thread pool still decodes the rest of the batch into memory that is gone (seen within seconds on
a busy machine; with files that only the decoder refuses, never in 3,000 batches). So everything that the parser checks
is checked here, more strictly, and whatever is unusual goes to Pillow instead.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

__all__ = ["PNG_TURNS", "exif_orientation", "plain_jpeg", "plain_png"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks whose meaning DALI does not take as Pillow does: orientation, animation, transparency.
_PNG_REFUSED = frozenset({b"eXIf", b"acTL", b"tRNS"})

# What Pillow reads an orientation from, wherever it stands: a chunk, and keywords of text chunks.
PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})

_EXIF = b"Exif\0\0"
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION, _SHORT = 0x0112, 3
_START_OF_SCAN, _APP1, _APP14 = 0xDA, 0xE1, 0xEE
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; all with Huffman codes
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a length: not allowed between segments, though some decoders pass over them.
_STANDALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF})
# Sampling factors of the luma where both chromas have 1 × 1, as horizontal · 16 + vertical.
_LUMA_SAMPLING = frozenset({0x11, 0x21, 0x22, 0x12, 0x41, 0x42, 0x24})


def plain_jpeg(raw: bytes) -> bool:
    """Well-formed segments up to the first scan, one frame of 8 bits in 1 or 3 components, and the end marker."""
    if not raw.startswith(b"\xff\xd8") or not raw.endswith(b"\xff\xd9"):
        return False
    at, frames, progressive = 2, 0, False
    while at + 4 <= len(raw):
        marker = raw[at + 1]
        if raw[at] != 0xFF or marker in _STANDALONE or marker in _OTHER_FRAMES:
            return False
        if marker == _START_OF_SCAN:
            return frames == 1 and (progressive or _one_scan(raw, at + 4))
        length = raw[at + 2] << 8 | raw[at + 3]  # of the segment, these two bytes included
        body = raw[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return False
        if marker in _FRAMES:
            frames += 1
            progressive = marker == 0xC2
            if not _plain_frame(body):
                return False
        elif (marker == _APP14 and length < 7) or (marker == _APP1 and length < 16):
            return False  # the parser reads on past such a segment's end
        at += 2 + length
    return False


def exif_orientation(raw: bytes) -> int | None:
    """The orientation, 1 to 8, that the one EXIF block of a `plain_jpeg` states in its first directory.

    None where there is no block or more than one, or where anything about it is unusual.
    """
    blocks, at = [], 2
    while raw[at + 1] != _START_OF_SCAN:
        length = raw[at + 2] << 8 | raw[at + 3]
        if raw[at + 1] == _APP1 and raw[at + 4 : at + 10] == _EXIF:
            blocks.append(raw[at + 10 : at + 2 + length])
        at += 2 + length
    if len(blocks) != 1:
        return None
    tiff = blocks[0]
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    if first < 8 or first + 2 > len(tiff):
        return None
    (entries,) = struct.unpack_from(order + "H", tiff, first)
    if first + 2 + 12 * entries + 4 > len(tiff):
        return None
    found = []
    for entry in range(first + 2, first + 2 + 12 * entries, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == _ORIENTATION:
            found.append(value if (kind, count) == (_SHORT, 1) else 0)
    return found[0] if len(found) == 1 and 1 <= found[0] <= 8 else None


def plain_png(raw: bytes) -> bool:
    """Eight bits, every checksum right, the end chunk in its place, and no chunk that turns or blends the pixels."""
    if not raw.startswith(_PNG_SIGNATURE) or len(raw) < 33 or raw[12:16] != b"IHDR" or raw[24] != 8 or any(raw[26:28]):
        return False
    view, at, behind = memoryview(raw), len(_PNG_SIGNATURE), False
    while at + 12 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        end = at + 8 + length
        if end + 4 > len(raw) or struct.unpack_from(">I", raw, end)[0] != zlib.crc32(view[at + 4 : end]):
            return False
        kind = raw[at + 4 : at + 8]
        if kind == b"IEND":
            return bool(end + 4 == len(raw))
        if kind in _PNG_REFUSED or (behind and kind in _PNG_TEXTS and raw.startswith(PNG_TURNS, at + 8)):
            return False  # a text before the pixels is read with the header
        behind = behind or kind == b"IDAT"
        at = end + 4
    return False


def _one_scan(raw: bytes, start: int) -> bool:
    """Nothing but entropy-coded data, restart markers and the end marker from `start` on.

    Any other marker in there ends the picture for DALI, which shows what it has, and is an error for Pillow, which goes
    on to read what the marker announces: the verdicts differed on one damaged file of seven.
    """
    scan = np.frombuffer(raw, np.uint8, offset=start)
    kinds = scan[1:][scan[:-1] == 0xFF]
    restarts = (kinds >= 0xD0) & (kinds <= 0xD7)
    return bool(len(kinds) and kinds[-1] == 0xD9 and np.all((kinds[:-1] == 0) | restarts[:-1]))


def _plain_frame(body: bytes) -> bool:
    """8 bits; gray, or three components of YCbCr with chroma subsampled in one of the usual ways."""
    if len(body) < 9 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return False
    if body[5] == 1:
        return True
    # without a marker that says otherwise these names mean RGB to libjpeg; nvJPEG does not say what they mean to it
    if body[6:15:3] == b"RGB":
        return False
    return body[5] == 3 and body[7] in _LUMA_SAMPLING and body[10] == body[13] == 0x11
