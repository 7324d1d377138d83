"""The generated pages of docs/reference/ by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.documentation import command_line, configuration, python_interface

__all__ = ["PAGES", "REFERENCE", "write"]

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration.page,
    "command_line.md": command_line.page,
    "python.md": python_interface.page,
}


def write(folder: Path = REFERENCE) -> list[Path]:
    """Write every page; the paths that were written."""
    written = []
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
        written.append(folder / name)
    return written
