"""The one exception that means "the user can mend this": the command line prints it as a single line and exits with
2.
"""

from __future__ import annotations

import errno

__all__ = ["Interrupted", "UserError", "because"]

# What to do about a failed write, by its cause; a code that is not here has its own text and no advice.
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
    """A mistake or a circumstance that the user can mend: one line that says what, where and what to do."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was obeyed: what there was to save is saved, and the user has been told where."""


def because(error: OSError, otherwise: str = "") -> str:
    """Why a file could not be read or written, and what to do: "No space left on device; free space there".

    otherwise: what to do whatever the cause is; it comes first.
    """
    advice = [words for words in (otherwise, _ADVICE.get(error.errno or 0)) if words]
    reason = error.strerror or str(error)
    return f"{reason}; {', or '.join(advice)}" if advice else reason
