"""Settings that a set of images is too small for: they are reduced, and it is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.file_names import printable

__all__ = ["reduced", "reduced_lines"]


def reduced(asked: int, used: int, why: str) -> dict[str, Any]:
    """An entry for JSON."""
    return {"asked": asked, "used": used, "why": why}


def reduced_lines(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each setting."""
    return [
        printable(f"{name}: {entry['used']} instead of {entry['asked']}: {entry['why']}")
        for name, entry in entries.items()
    ]
