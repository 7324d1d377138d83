"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["sync", "whole_folder", "write_whole", "write_whole_text"]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """What `write` puts into the file that it is given becomes `path`, once it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def write_whole_text(path: Path, text: str) -> None:
    """The same of a text, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


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
