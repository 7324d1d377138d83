"""Errors that the user can fix: the command line prints them as one line and exits with 2."""

from __future__ import annotations

import errno

__all__ = ["Interrupted", "UserError", "because"]

# What to do about a failed write, by its cause; other codes get the system's text alone.
_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "check its owner and permissions",
    errno.EPERM: "check its owner and permissions",
    errno.EIO: "the disk or its server fails: check it",
    errno.ESTALE: "its server has lost it: mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close files of other programs: the machine's limit is reached",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a folder should; write elsewhere",
    errno.EISDIR: "a folder stands where a file should: move it away, or write elsewhere",
    errno.EFBIG: "the file system or ulimit -f allows no file of that size",
}


class UserError(Exception):
    """An error that the user can fix, as one line: what is wrong, where, what to do."""


class Interrupted(KeyboardInterrupt):
    """A Ctrl-C after which the state is saved, and the user has been told where."""


def because(error: OSError, otherwise: str = "") -> str:
    """Return why a file operation failed and what to do: "No space left on device; free space there".

    otherwise: advice for any cause, put first.
    """
    advice = [words for words in (otherwise, _ADVICE.get(error.errno or 0)) if words]
    reason = error.strerror or str(error)
    return f"{reason}; {', or '.join(advice)}" if advice else reason
