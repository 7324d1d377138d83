"""Check that an output can be written before computing it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iwm_fast.errors import UserError, because
from iwm_fast.streams import output_closed

__all__ = [
    "is_special",
    "require_file",
    "require_folder",
    "require_new_file",
    "require_new_folder",
    "require_result",
    "unwritable",
    "writing",
]

_PROBE = bytes(4096)  # one block: a full disk still takes empty files


def require_result(destination: str | Path, option: str = "--json") -> None:
    """Raise UserError where a result cannot be written to a file, or to standard output for ``-``."""
    if str(destination) == "-":
        if output_closed():
            raise UserError(f"{option}: standard output is closed; name a file")
    else:
        require_file(Path(destination), option)


def require_file(path: Path, option: str) -> None:
    """Raise UserError where `path` cannot be written; its folder may be missing. ``option``: what named it."""
    if path.is_dir():
        raise UserError(f"{option}: {path}: is a folder; name a file")
    if is_special(path):
        why = None if os.access(path, os.W_OK) else "Permission denied"
    else:
        final = path.resolve() if path.is_symlink() else path
        why = unwritable(final.parent, f".{final.name}.probing")  # as long a name as the partial file's
    if why is not None:
        raise UserError(f"{option}: {path}: cannot be written: {why}; name another file")


def require_new_file(path: Path, option: str = "--out") -> None:
    """Raise UserError where `path` exists or cannot be written. A pipe or a device such as /dev/null is allowed."""
    if os.path.lexists(path) and not is_special(path) and not path.is_dir():
        raise UserError(f"{path}: exists already; choose another {option}")
    require_file(path, option)


def require_new_folder(out: Path, option: str = "--out") -> None:
    """Raise UserError where `out` exists or cannot be made; its parents may be missing."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; choose another {option}")
    why = unwritable(out.parent, f".{out.name}.{os.getpid()}.partial")
    if why is not None:
        raise UserError(f"{out}: cannot be written: {why}; choose another {option}")


def require_folder(out: Path, option: str = "--out", *, read: str | Path | None = None) -> None:
    """Raise UserError where `out` cannot hold new files; it may be missing. `read`: the images that it is made from,
    if what is written would be taken for more of them: then it may not lie among them.
    """
    if read is not None and _is_listed(Path(os.path.realpath(out)), Path(os.path.realpath(read))):
        raise UserError(f"{out}: lies in {read}, where its files would be read as images; choose another {option}")
    why = unwritable(out)
    if why is not None:
        raise UserError(f"{out}: cannot be written: {why}; choose another {option}")


def _is_listed(out: Path, root: Path) -> bool:
    """Return whether a listing of the folder `root` enters `out`, both resolved; it enters no hidden folder."""
    if not root.is_dir() or not out.is_relative_to(root):
        return False
    return not any(part.startswith(".") for part in out.relative_to(root).parts)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError while writing `out` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error


def unwritable(folder: Path, name: str = "") -> str | None:
    """Return why a file cannot be written into `folder`, whose parents may be missing, or None.

    Writes one to find out, because permissions do not show a full disk, a read-only one, or another user's network
    folder. ``name``: the file's, where its length matters.
    """
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        if place != folder.absolute() or not name:
            with tempfile.TemporaryFile(dir=place, buffering=0) as file:
                file.write(_PROBE)
            return None
        probe = place / name
        try:
            with probe.open("xb", buffering=0) as file:
                file.write(_PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None


def is_special(path: Path) -> bool:
    """Return whether `path` is a pipe, a device, or a file that this process has open."""
    target = str(path.readlink() if path.is_symlink() else path)
    return target.startswith(("/proc/", "/dev/fd/")) or (path.exists() and not path.is_file())
