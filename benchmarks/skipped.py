"""Why something that is compared with cannot take part."""

from __future__ import annotations

__all__ = ["Skipped"]


class Skipped(Exception):  # noqa: N818  (a reason, not an error)
    """Why a contender cannot take part."""
