"""Where bytes lie: files below a folder of this machine. `s3` holds the other place."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from iwm_fast.data.encoded import BadSample
from iwm_fast.errors import UserError

__all__ = ["DataGone", "LocalStorage", "Storage"]

# What a network file system says of a server that does not answer, as opposed to a file that is not there.
_NO_ANSWER = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH})


class DataGone(UserError):  # noqa: N818  (a circumstance, as UserError itself says)
    """Not one sample but the place where it was cannot be read: no verdict on the sample; it may come back."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; bring the data back, then go on with --resume auto")
        self.what = what


class Storage(Protocol):
    """Named pieces of bytes below one root. `read` may be called from several threads at a time."""

    root: str  # as people write it: an absolute path, or s3://bucket/prefix
    readers: int  # reads that are worth having in flight at a time

    def shown(self, name: str) -> str:
        """The full name of a piece: an absolute path, or an address."""
        ...

    def names(self) -> list[str]:
        """Every piece below the root, sorted, but for hidden ones (a part begins with a dot). UserError if it fails."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a piece of that name."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a piece. BadSample and UserError as `read`."""
        ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """A piece's bytes from `offset`: `length` of them, fewer where it ends before, or all.

        BadSample where this piece cannot be read; DataGone where the whole place is gone.
        """
        ...

    def close(self) -> None:
        """End waiting reads soon."""
        ...


class LocalStorage:
    """Files below the folder `root`."""

    readers = 1

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.root = str(self._root)

    def shown(self, name: str) -> str:
        """The file's absolute path; of a name that is one already, this."""
        if name.startswith("/"):
            return name
        return f"{self.root.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Paths below the root with forward slashes; links are followed, each real folder is visited once."""
        seen: set[tuple[int, int]] = set()
        found: list[str] = []
        for folder, inside, files in os.walk(self.root, followlinks=True, onerror=_refuse):
            status = os.stat(folder)  # noqa: PTH116  (os.walk gives strings)
            if (status.st_dev, status.st_ino) in seen:
                inside.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            prefix = folder[len(self.root) :].strip("/")
            prefix = f"{prefix}/" if prefix else ""
            found += [prefix + name for name in files if not name.startswith(".")]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._root / name).is_file()

    def size(self, name: str) -> int:
        """The file's length in bytes."""
        try:
            return os.stat(self.shown(name)).st_size  # noqa: PTH116  (a million of them)
        except OSError as error:
            raise self._verdict(name, error) from error

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """The file's bytes; what is not a regular file (a pipe would never end) is empty or a BadSample."""
        try:
            # Not blocking, so that a named pipe cannot stop a training; regular files are read as ever.
            file = os.open(self.shown(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                wanted = os.fstat(file).st_size - offset if length is None else length
                return _read_fully(file, max(0, wanted), offset) if wanted > 0 else b""
            finally:
                os.close(file)
        except OSError as error:
            raise self._verdict(name, error) from error

    def close(self) -> None:
        """Nothing waits here."""

    def _verdict(self, name: str, error: OSError) -> BadSample | DataGone:
        """One file is the matter, or its whole folder: a mount that went away leaves none, or an empty one."""
        folder = os.path.dirname(self.shown(name))  # noqa: PTH120  (names that are no text stay as they are)
        if error.errno in _NO_ANSWER:
            return DataGone(f"{folder}: the data folder does not answer ({error.strerror})")
        try:
            with os.scandir(folder) as entries:
                if next(entries, None) is None:
                    return DataGone(f"{folder}: the data folder is empty")
        except (NotADirectoryError, PermissionError):
            pass
        except OSError as gone:
            return DataGone(f"{folder}: the data folder is gone ({gone.strerror})")
        return BadSample(f"cannot be read: {error.strerror or error}")


def _read_fully(file: int, wanted: int, offset: int) -> bytes:
    """One call gives all in practice; only above 2 GB, or at the end of the file, fewer bytes come."""
    data = os.pread(file, wanted, offset)
    if len(data) == wanted:
        return data
    parts = [data]
    while parts[-1] and sum(map(len, parts)) < wanted:
        done = sum(map(len, parts))
        parts.append(os.pread(file, wanted - done, offset + done))
    return b"".join(parts)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error
