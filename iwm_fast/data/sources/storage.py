"""Storage on this machine: files below a folder. `s3` is the other storage."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.errors import UserError, because

__all__ = ["SYSTEM_FOLDERS", "DataGone", "LocalStorage", "Storage", "is_folder"]

# Folders that systems and servers keep beside people's files, by their exact names; those that begin with a dot are
# hidden ones. Some may be listed by root only.
SYSTEM_FOLDERS = frozenset(
    {
        "lost+found",  # ext2 to ext4
        "System Volume Information", "$RECYCLE.BIN", "$Recycle.Bin", "RECYCLER", "found.000",  # Windows
        "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot",  # Synology, QNAP, NetApp
        "__MACOSX",  # ZIP archives of macOS
    }
)  # fmt: skip
# Errors of this process or machine, not of the file: too many open files, or no memory.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
# Errors of a network file system whose server does not respond, as opposed to a missing file.
_NO_ANSWER = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH})

_SIZES_THREADS, _SIZES_SPAN = 16, 500
# Times of files have steps of up to 2 s (FAT, some servers): a file that changed since may change again unseen.
SETTLED_NS = 2_000_000_000


class DataGone(UserError):  # noqa: N818  (a circumstance, as UserError itself says)
    """The place of a sample is gone, not the sample alone: no verdict on it; the place may come back."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; bring the data back, and start again: a training resumes with --resume auto")
        self.what = what


class Storage(Protocol):
    """Named files or objects below one root. `read` may be called from several threads at once."""

    root: str  # as people write it: an absolute path, or s3://bucket/prefix
    readers: int  # useful number of reads in flight
    system_folders: tuple[str, ...]  # that `names` passed over, below the root
    repeated_folders: tuple[str, ...]  # other names of folders that `names` has been in, by links

    def shown(self, name: str) -> str:
        """The full name of a piece: an absolute path, or an address."""
        ...

    def names(self) -> list[str]:
        """Every piece below the root, sorted, but for hidden ones (a part begins with a dot) and SYSTEM_FOLDERS.

        UserError if it fails.
        """
        ...

    def walk(self) -> Iterator[str]:
        """Yield what `names` returns in another order, in memory that does not grow with their number."""
        ...

    def stamps(self, names: Sequence[str]) -> list[bytes | None]:
        """Return for each of some sorted names what changes when the piece does; None for a missing one, and for one
        that changed so recently that a further change might not show.
        """
        ...

    def has(self, name: str) -> bool:
        """Return whether there is one of that name."""
        ...

    def size(self, name: str) -> int:
        """Return its bytes. BadSample and UserError as `read`."""
        ...

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Return the bytes of many, in order, as fast as the storage allows; -1 for a missing one."""
        ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset`, fewer where it ends before, or all.

        Raises BadSample where it cannot be read; DataGone where the whole place is gone; UserError where this process
        may open no more files.
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
        self.system_folders: tuple[str, ...] = ()
        self.repeated_folders: tuple[str, ...] = ()
        self._mounts: tuple[str, ...] = ()  # folders below the root, as `names` found them, that lie on other disks

    def shown(self, name: str) -> str:
        """The file's absolute path; of a name that is one already, this."""
        if name.startswith("/"):
            return name
        return f"{self.root.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Paths below the root with forward slashes; links are followed, each real folder is visited once."""
        return sorted(self.walk())

    def walk(self) -> Iterator[str]:
        """The paths, folder by folder, each folder's as the system lists them."""
        seen: set[tuple[int, int]] = set()
        of_system, mounts, repeated = [], [], []
        waiting = [self.root]
        while waiting:
            folder = waiting.pop()
            with _refusing(folder):
                status = os.stat(folder)  # noqa: PTH116  (a million of them)
            prefix = folder[len(self.root) :].strip("/")
            if (status.st_dev, status.st_ino) in seen:
                repeated.append(prefix)
                continue
            if not seen:
                disk = status.st_dev
            elif status.st_dev != disk:
                mounts.append(folder)
            seen.add((status.st_dev, status.st_ino))
            prefix = f"{prefix}/" if prefix else ""
            inside = []
            with _refusing(folder), os.scandir(folder) as entries:
                for entry in entries:
                    if is_folder(entry):
                        inside.append(entry.name)
                    elif not entry.name.startswith("."):
                        yield prefix + entry.name
            of_system += [prefix + name for name in inside if name in SYSTEM_FOLDERS]
            inside = [name for name in inside if not name.startswith(".") and name not in SYSTEM_FOLDERS]
            waiting += [os.path.join(folder, name) for name in sorted(inside, reverse=True)]  # noqa: PTH118
        self.system_folders, self._mounts = tuple(sorted(of_system)), tuple(mounts)
        self.repeated_folders = tuple(sorted(repeated))

    def stamps(self, names: Sequence[str]) -> list[bytes | None]:
        """Size and times of each file."""
        return [self._stamp(name) for name in names]

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._root / name).is_file()

    def size(self, name: str) -> int:
        """The file's length in bytes."""
        try:
            return os.stat(self.shown(name)).st_size  # noqa: PTH116  (a million of them)
        except OSError as error:
            raise self._verdict(name, error) from error

    def sizes(self, names: Sequence[str]) -> list[int]:
        """By several threads: on a network file system each question is a round trip."""
        spans = [names[first : first + _SIZES_SPAN] for first in range(0, len(names), _SIZES_SPAN)]
        with ThreadPoolExecutor(_SIZES_THREADS) as pool:
            return [size for sizes in pool.map(self._sizes_of, spans) for size in sizes]

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

    def _stamp(self, name: str) -> bytes | None:
        now = time.time_ns()
        try:
            status = os.stat(self.shown(name))  # noqa: PTH116  (a million of them)
        except OSError:
            return None
        if max(status.st_mtime_ns, status.st_ctime_ns) > now - SETTLED_NS:
            return None
        return b"%d %d %d" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def _sizes_of(self, names: Sequence[str]) -> list[int]:
        found = []
        for name in names:
            try:
                found.append(os.stat(self.shown(name)).st_size)  # noqa: PTH116  (a million of them)
            except OSError:
                found.append(-1)
        return found

    def _verdict(self, name: str, error: OSError) -> BadSample | UserError:
        """What is the matter: the file, its folder, or the place of all, of which a mount that went away leaves nothing
        or an empty folder.
        """
        path = self.shown(name)
        folder = os.path.dirname(path)  # noqa: PTH120  (names that are no text stay as they are)
        if error.errno in _OURS:
            return UserError(f"{path}: cannot be read: {because(error)}")
        if error.errno in _NO_ANSWER:
            return DataGone(f"{folder}: the data folder does not answer ({error.strerror})")
        lost = _emptiness(folder)
        if lost is None:
            return BadSample(f"cannot be read: {error.strerror or error}")
        while len(folder) > len(self.root) and folder not in self._mounts and not os.path.islink(folder):  # noqa: PTH114
            above = os.path.dirname(folder)  # noqa: PTH120
            beside = _emptiness(above, but_for=folder)
            if beside is None:  # the place is there: somebody removed this folder of it
                return BadSample(f"cannot be read: its folder {folder} is {lost}")
            folder, lost = above, beside
        return DataGone(f"{folder}: the data folder is {lost}")


def _emptiness(folder: str, but_for: str | None = None) -> str | None:
    """None where the folder holds something, or cannot be listed; else how it does not, in words.

    but_for: something in it that does not count.
    """
    try:
        with os.scandir(folder) as entries:
            return None if any(entry.path != but_for for entry in entries) else "empty"
    except (NotADirectoryError, PermissionError):
        return None
    except OSError as gone:
        return f"gone ({gone.strerror})"


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


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether a folder's entry is a folder, through links; one in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


@contextmanager
def _refusing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or folder
        _refuse(error)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {because(error)}") from error
