"""Names as they can be printed: file systems and labels allow what a terminal, a table or a log line does not."""

from __future__ import annotations

__all__ = ["printable"]


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
