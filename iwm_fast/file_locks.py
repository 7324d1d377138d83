"""Locks on files: one process at a time holds one, on file systems that have locks."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

from iwm_fast.notices import tell_once

__all__ = ["hold"]

# Errors of file systems without locks (Lustre without -o flock, some FUSE, CIFS and NFS servers). A lock that another
# process holds gives others.
_NO_LOCKS = frozenset(
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EPERM, errno.ENOTTY, errno.EBADF}
)


def hold(file: IO[Any], of: str) -> bool:
    """Lock a file that is open for writing until it is closed; return whether it is locked.

    False on a file system without locks, with a notice that names ``of``. Raises BlockingIOError where another process
    holds the lock, OSError where the disk or its server fails.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX allows both for a lock that is held
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno not in _NO_LOCKS:
            raise
        tell_once(
            f"{of}: its file system has no locks ({error.strerror}), so nothing stops two jobs from writing there; "
            "start one at a time"
        )
        return False
    return True
