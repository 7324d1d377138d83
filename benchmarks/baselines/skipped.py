"""Why a baseline is not timed, and how a row records a failure."""

from __future__ import annotations

__all__ = ["Skipped", "in_a_line"]


class Skipped(Exception):  # noqa: N818  (a reason, not an error)
    """The reason why an implementation is not timed."""


def in_a_line(error: BaseException, most: int = 200) -> str:
    """Return an error's type and its first line, cut to `most` characters."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:most]}"
