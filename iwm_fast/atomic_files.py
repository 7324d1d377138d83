"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from iwm_fast.outputs import is_special, writing

__all__ = ["new_file", "sync", "sync_open", "whole_folder", "write_whole", "write_whole_text"]

# What a file system answers that has no such call: CIFS and some FUSE for folders. A full or failing disk is none of
# them.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EISDIR})
# A folder that may be written to and not listed cannot be opened to be synced.
_CANNOT_OPEN = _CANNOT_SYNC | {errno.EACCES, errno.EPERM}


def sync_open(handle: int) -> None:
    """Wait until what was written to an open file is on the disk, where its file system can say so."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk, where its file system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _CANNOT_OPEN and path.is_dir():
            return
        raise
    try:
        sync_open(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """What `write` puts into the file that it is given becomes `path`, once it is on the disk.

    A link keeps pointing at its file, which is replaced; a pipe or a device such as /dev/null is written to as it is.
    """
    if is_special(path):
        with path.open("wb") as file:
            write(file)
        return
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            sync_open(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk, what was written has to go
    sync(path.parent)


def write_whole_text(path: Path, text: str) -> None:
    """The same of a text, in UTF-8; bytes of file names that are no UTF-8 (``surrogateescape``) stay as they are."""
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written that takes the name `path` when the block ends well and goes away when it does not.

    Its folder is made. UserError where `path` cannot be written, or is there by then: another process's file stays. A
    pipe or a device is written to as it is.
    """
    with writing(path):
        special = is_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path if special else path.with_name(f".{path.name}.{os.getpid()}.partial")
        file = partial.open("wb")
    try:
        yield file
        with writing(path):
            file.flush()
            if special:
                return
            sync_open(file.fileno())
            _take_name(partial, path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # of a full disk, whose error has been raised
            file.close()
        if not special:
            partial.unlink(missing_ok=True)


def _take_name(partial: Path, path: Path) -> None:
    """Give a file its name. FileExistsError where something has it."""
    try:
        os.link(partial, path)  # which, unlike a rename, replaces nothing
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        partial.replace(path)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, to be filled, that takes its name when the block ends well and goes away when it does not.

    OSError where `out` is there by then and not empty.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
