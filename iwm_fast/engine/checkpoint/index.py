"""Read and check a checkpoint's ``index.json``: the place of each fragment, and that together they are every
tensor once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Piece", "read_index"]


@dataclass(frozen=True, order=True)
class Piece:
    """Elements ``start`` to ``start + length`` of the flattened ``kind`` of parameter ``name``, and their file."""

    kind: str
    name: str
    start: int
    length: int
    file: str

    @property
    def key(self) -> str:
        """Its key in the file."""
        return f"{self.kind}/{self.name}@{self.start}"


def read_index(path: Path, version: str) -> tuple[dict[str, Any], list[Piece]]:
    """Return (index, fragments).

    Raises OSError where it cannot be read, ValueError with the reason where it is no index or contradicts itself.
    """
    try:
        index = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(index, dict) or index.get("format") != version:
        raise ValueError(f"is not of format {version!r}")
    for key in ("step", "updates"):
        if not _count(index.get(key)):
            raise ValueError(f"{key} is {index.get(key)!r}; it must be a count")
    shapes = index.get("shapes")
    if not isinstance(shapes, dict) or not all(isinstance(s, list) and all(map(_count, s)) for s in shapes.values()):
        raise ValueError("shapes must give each tensor a list of sizes")
    frozen = index.get("frozen")
    if frozen is not None and not (isinstance(frozen, dict) and _count(frozen.get("bytes")) and "sha256" in frozen):
        raise ValueError(f"frozen is {frozen!r}; it must give bytes and sha256 of the frozen weights")
    pieces = [_piece(entry) for entry in _list(index.get("fragments"))]
    _require_each_once(shapes, pieces)
    return index, pieces


def _piece(entry: Any) -> Piece:
    values = _list(entry)
    if len(values) != 5 or not all(isinstance(values[i], str) for i in (0, 1, 4)) or not all(map(_count, values[2:4])):
        raise ValueError(f"fragment {entry!r} is not [kind, name, start, length, file]")
    if Path(values[4]).name != values[4]:
        raise ValueError(f"fragment {entry!r} is in no file of this folder")
    return Piece(*values)


def _require_each_once(shapes: dict[str, list[int]], pieces: list[Piece]) -> None:
    """Check that fragments cover every tensor from its first element to its last without overlap."""
    reached = dict.fromkeys(shapes, 0)
    for piece in sorted(pieces):
        tensor = f"{piece.kind}/{piece.name}"
        if reached.get(tensor) != piece.start:
            raise ValueError(f"{tensor}: a fragment begins at {piece.start}, expected {reached.get(tensor)}")
        reached[tensor] += piece.length
    for tensor, end in reached.items():
        if end != math.prod(shapes[tensor]):
            raise ValueError(f"{tensor} is incomplete ({end} of {math.prod(shapes[tensor])} elements)")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {type(value).__name__}")  # noqa: TRY004  (of a file's content)
    return value
