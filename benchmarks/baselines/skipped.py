"""Why something that is compared with cannot take part, and how a failure is said in a row."""

from __future__ import annotations

__all__ = ["Skipped", "in_a_line"]


class Skipped(Exception):  # noqa: N818  (a reason, not an error)
    """Why a contender cannot take part."""


def in_a_line(error: BaseException, most: int = 200) -> str:
    """An error's kind and its first line, of which `most` characters."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:most]}"
