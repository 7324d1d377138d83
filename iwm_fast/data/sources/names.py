"""Millions of names in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

__all__ = ["Names", "escape", "unescape"]

_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_ENCODING = ("utf-8", "surrogateescape")  # names of files are bytes, and need not be UTF-8


class Names(Sequence[str]):
    """A sequence of texts in one buffer of bytes: a name is text[starts[i]:ends[i]], decoded on access.

    A million names of 30 characters take 46 MB, as a list of `str` 87 MB with an object each that Python's garbage
    collector visits. escaped: the bytes are as `escape` wrote them.
    """

    __slots__ = ("_ends", "_escaped", "_starts", "_text")

    def __init__(
        self, text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], *, escaped: bool = False
    ) -> None:
        self._text, self._starts, self._ends, self._escaped = text, starts, ends, escaped

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The given names."""
        encoded = [name.encode(*_ENCODING) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        return cls(b"".join(encoded), starts, ends)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Names: ...
    def __getitem__(self, place: int | slice) -> str | Names:
        if isinstance(place, slice):
            return Names(self._text, self._starts[place], self._ends[place], escaped=self._escaped)
        name = self._text[self._starts[place] : self._ends[place]].decode(*_ENCODING)
        return unescape(name) if self._escaped else name


def escape(name: str) -> str:
    """Return a name without tabs and line ends; nearly all are unchanged."""
    for plain, written in _ESCAPES:
        name = name.replace(plain, written)
    return name


def unescape(text: str) -> str:
    """Invert `escape`."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    for plain, written in _ESCAPES[1:]:
        parts = [part.replace(written, plain) for part in parts]
    return "\\".join(parts)
