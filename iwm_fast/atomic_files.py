"""Write files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from iwm_fast.outputs import is_special, writing

__all__ = ["link_or_copy", "new_file", "sync", "sync_open", "whole_folder", "write_whole", "write_whole_text"]

# Errors of file systems without fsync on this kind of file: CIFS, and some FUSE for folders. A full or failing disk
# gives others.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EISDIR})
# A folder that can be written to but not listed cannot be opened for fsync.
_CANNOT_OPEN = _CANNOT_SYNC | {errno.EACCES, errno.EPERM}


def sync_open(handle: int) -> None:
    """Flush an open file to the disk, where its file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk, where its file system can."""
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
    """Write `path` by `write(file)`; it takes its name once its bytes are on the disk.

    A link keeps pointing at its file, which is replaced; a pipe or a device such as /dev/null is written to directly.
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
        partial.unlink(missing_ok=True)  # frees a full disk
    sync(path.parent)


def write_whole_text(path: Path, text: str) -> None:
    """Write text as `write_whole` does, in UTF-8; bytes of file names that are not UTF-8 survive."""
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the name `path` when the block succeeds, and is removed when it fails.

    Makes its folder. Raises UserError where `path` cannot be written or exists by then: another process's file stays. A
    pipe or a device is written to directly.
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
        with suppress(OSError):  # a full disk's error is raised already
            file.close()
        if not special:
            partial.unlink(missing_ok=True)


def _take_name(partial: Path, path: Path) -> None:
    """Name the file. Raises FileExistsError where the name is taken."""
    try:
        os.link(partial, path)  # unlike a rename, replaces nothing
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        partial.replace(path)


def link_or_copy(path: Path, other: Path) -> None:
    """Give a file a second name, by a hard link where the disk has them, else by a copy."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its name when the block succeeds, and is removed when it fails.

    Raises OSError where `out` exists by then and is not empty.
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
