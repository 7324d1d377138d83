"""Names that a file system or a label allows and that not every terminal, table, text or library takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["printable", "utf8_name", "valid_unicode"]

_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text on one line, without control characters: a line break becomes ``\n``, an escape ``\x1b``.

    A byte of a file's name that is not UTF-8 (in Python a lone surrogate) becomes ``\xe9``. Other text stays as it is.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's range
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def valid_unicode(text: str) -> str:
    r"""The text in valid Unicode: a byte 0xXX of a file name that is no UTF-8 (``surrogateescape``) is ``\udcXX``."""
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of ``path`` in UTF-8, which safetensors, TensorBoard and onnxruntime need.

    It is its own name, or where its folder's is not UTF-8, one by way of an open descriptor. ``path``'s folder has to
    be there; the name is good inside the block.
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
