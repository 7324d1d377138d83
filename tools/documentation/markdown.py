"""Text as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

__all__ = ["GENERATED", "from_docstring", "table"]

GENERATED = "Written by `python -m tools.documentation` from the code."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. A bar in a cell is escaped, a line break becomes a space."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def from_docstring(text: str | None) -> str:
    """A docstring without its indentation, double backticks as single ones."""
    return re.sub(r"``([^`]+)``", r"`\1`", inspect.cleandoc(text or ""))
