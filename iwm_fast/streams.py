"""Standard streams that survive every terminal, pipe and file.

A character that the terminal cannot show, and a byte of a file name that is not UTF-8, are written in ASCII. A closed
reader, a full disk or a closed stream never stops the work: measurements matter more than a line of output.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any

from iwm_fast.errors import UserError

__all__ = ["open_streams", "output_closed", "output_failure"]

_ERRORS = "iwm_fast_shown"
# Our non-ASCII characters, for terminals with ASCII or one code page.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "±": "+/-", "×": "x", "·": ".", "…": "...", "→": "->", "°": " degrees", "²": "^2",
    "█": "#", "≤": "<=", "≥": ">=", "≈": "~", "∞": "inf",
}  # fmt: skip


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # surrogateescape's range: a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error(_ERRORS, _replaced)


class _Output(io.RawIOBase):
    """A file descriptor whose writes never raise: after a failure, the rest goes to ``instead``, or nowhere."""

    def __init__(self, descriptor: int, instead: int | None) -> None:
        self._descriptor, self._instead = descriptor, instead
        self.failure: OSError | None = None
        self._gone = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        while view and not self._gone:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # another process made the pipe non-blocking, which print does not handle
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._gone = True
                # A closed pipe is no loss: its reader has read enough. Any other failure is reported at the end.
                self.failure = None if error.errno == errno.EPIPE else error
        if view and self.failure is not None and self._instead is not None:
            _write_all(self._instead, view)
        return size


def _write_all(descriptor: int, view: memoryview) -> None:
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        return  # no stream is left to report on


class _Stream(io.TextIOWrapper):
    """A standard stream over `_Output`."""

    def __init__(self, output: _Output, like: Any, *, closed: bool) -> None:
        encoding = getattr(like, "encoding", None) or "utf-8"
        buffered = getattr(like, "line_buffering", False)
        super().__init__(
            io.BufferedWriter(output), encoding, _ERRORS, line_buffering=buffered or output.isatty(),
            write_through=getattr(like, "write_through", False),
        )  # fmt: skip
        self.output = output
        self.was_closed = closed


def open_streams() -> None:
    """Set up sys.stdout and sys.stderr; call it first in a program. A second call changes nothing.

    Streams that a test or a notebook has replaced keep their files, and only gain the ability to write any text.
    """
    _fill_descriptors()
    for name, descriptor, instead in (("stdout", 1, 2), ("stderr", 2, None)):
        stream = getattr(sys, name)
        if isinstance(stream, _Stream):
            continue
        if stream is None or (stream is getattr(sys, f"__{name}__") and _descriptor_of(stream) == descriptor):
            if stream is not None:
                stream.flush()
            own = _Stream(_Output(descriptor, instead), stream, closed=stream is None)
            setattr(sys, name, own)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def output_closed() -> bool:
    """Return whether standard output was closed when the program began."""
    return sys.stdout is None or bool(getattr(sys.stdout, "was_closed", False))


def output_failure() -> UserError | None:
    """Flush both streams; return the error where standard output lost some text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.flush()
    failure = sys.stdout.output.failure if isinstance(sys.stdout, _Stream) else None
    if failure is None:
        return None
    return UserError(f"standard output: {failure.strerror}; the rest went to standard error")


def _descriptor_of(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


def _fill_descriptors() -> None:
    """Open the null device for a closed descriptor 0, 1 or 2, which the next file would get otherwise."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
