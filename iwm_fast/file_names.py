"""Make text from file names and labels fit for terminals, tables, UTF-8 and libraries."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["printable", "utf8_name", "valid_unicode"]

_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text on one line without control characters: a line break becomes ``\n``, an escape ``\x1b``.

    A byte of a file's name that is not UTF-8 (a lone surrogate in Python) becomes ``\xe9``. Other text is unchanged.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's range
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def valid_unicode(text: str) -> str:
    r"""Return valid Unicode: a byte 0xXX of a file name that is not UTF-8 (``surrogateescape``) becomes ``\udcXX``."""
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """Yield a UTF-8 name of ``path``, which safetensors, TensorBoard and onnxruntime need.

    Its own name, or where its folder's name is not UTF-8, one through an open descriptor. ``path``'s folder must exist;
    the name is valid inside the block.
    """
    name = str(path)
    if valid_unicode(name) == name:
        yield name
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
