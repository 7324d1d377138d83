"""Settings that exceed a set of images: they are reduced and reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.file_names import printable

__all__ = ["reduced", "reduced_lines"]


def reduced(asked: int, used: int, why: str) -> dict[str, Any]:
    """Return an entry for JSON."""
    return {"asked": asked, "used": used, "why": why}


def reduced_lines(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line per setting."""
    return [
        printable(f"{name}: {entry['used']} instead of {entry['asked']}: {entry['why']}")
        for name, entry in entries.items()
    ]
