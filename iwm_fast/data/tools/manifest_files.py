"""The files of a manifest that is being written: its text and its stamps, and those of killed runs.

``.NAME.partial`` is locked by who writes NAME. It takes the new text, or, where a killed run left its text there, keeps
that to be read and ``.NAME.partial-1`` takes the new text, and so on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from iwm_fast.atomic_files import sync_open
from iwm_fast.data.tools.known_rows import row_sum, stamps_file
from iwm_fast.errors import UserError
from iwm_fast.file_locks import hold

__all__ = ["ManifestFiles", "writing_manifest"]


class ManifestFiles:
    """A new text with its stamps. earlier: texts whose rows may be reused, the newest first, `out` last."""

    def __init__(self, out: Path, text: BinaryIO, stamps: BinaryIO, killed: Sequence[Path]) -> None:
        self.out, self.earlier = out, [*killed, out]
        self._removed = killed[:-1]  # the last is the lock
        self._text, self._stamps = text, stamps

    def begin(self, lines: bytes) -> None:
        """Write the first lines."""
        self._text.write(lines)

    def write(self, line: bytes, stamp: bytes | None) -> None:
        """Write a row, whose file has this stamp."""
        self._text.write(line)
        self._stamps.write(row_sum(line, stamp))

    def flush(self, passed: Sequence[Path] = ()) -> None:
        """Leave no row in this process, then remove texts of killed runs that have been passed."""
        self._text.flush()
        self._stamps.flush()
        for path in set(passed).intersection(self._removed):
            _remove(path)

    def sync(self) -> None:
        """Have the disk store both files."""
        self.flush()
        sync_open(self._text.fileno())
        sync_open(self._stamps.fileno())


@contextmanager
def writing_manifest(out: Path) -> Iterator[ManifestFiles]:
    """Yield the files of the manifest that becomes `out` when the block succeeds. UserError where another process is
    writing it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    first = out.with_name(f".{out.name}.partial")
    with ExitStack() as opened:
        lock = _locked(first, out, opened)
        killed = sorted(out.parent.glob(f".{escape(out.name)}.partial-*[0-9]"), key=_number, reverse=True)
        for left in list(out.parent.glob(f".{escape(out.name)}.partial*.stamps")):
            if not left.with_name(left.name.removesuffix(".stamps")).exists():
                left.replace(stamps_file(out))  # killed after its text had taken its name
        text, text_file = lock, first
        if killed or os.fstat(lock.fileno()).st_size:
            text_file = first.with_name(f"{first.name}-{_number(killed[0]) + 1 if killed else 1}")
            text = opened.enter_context(_new(text_file))
            killed.append(first)
        files = ManifestFiles(out, text, opened.enter_context(_new(stamps_file(text_file))), killed)
        yield files
        files.sync()
        text_file.replace(out)
        stamps_file(text_file).replace(stamps_file(out))
        for path in killed:
            _remove(path)
        os.utime(out)  # renaming changed the folder's time; the manifest must not look older than its folder


def _locked(path: Path, out: Path, opened: ExitStack) -> BinaryIO:
    while True:
        file = opened.enter_context(path.open("a+b"))
        try:
            hold(file, str(out))
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is writing it; wait for it") from error
        with suppress(FileNotFoundError):  # whoever held it has finished
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file


def _new(path: Path) -> BinaryIO:
    return path.open("wb")


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _remove(text: Path) -> None:
    stamps_file(text).unlink(missing_ok=True)
    text.unlink(missing_ok=True)
