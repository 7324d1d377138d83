"""Read and check a checkpoint's ``index.json``: where each part of each tensor is, and that the parts are every tensor
once.

The index is small: the header of each rank's file lists what is in it. A tensor of which every rank holds an equal part
(``dealt``) takes one number, whatever the number of ranks. Of other tensors each fragment is listed.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "FORMATS", "Index", "Piece", "equal_part", "read_index", "shard_name"]

FORMAT = "iwm-fast-checkpoint/2"
# Of the first, the index lists every fragment of every tensor.
_FIRST = "iwm-fast-checkpoint/1"
FORMATS = (FORMAT, _FIRST)


@dataclass(frozen=True, order=True)
class Piece:
    """Elements ``start`` to ``start + length`` of a flattened tensor, and the file that holds them."""

    start: int
    length: int
    file: str


def shard_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def equal_part(elements: int, ranks: int) -> int:
    """Return the elements of a tensor that each rank holds of one that is dealt; the last ranks hold fewer, or none."""
    return max(1, -(-elements // ranks))


class Index:
    """The places of all tensors, named KIND/NAME, of a checkpoint."""

    def __init__(
        self,
        document: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        dealt: dict[str, int],
        listed: dict[str, list[Piece]],
    ) -> None:
        self.document, self.shapes, self._dealt = document, shapes, dealt
        self._listed = {tensor: sorted(pieces) for tensor, pieces in listed.items()}
        self._starts = {tensor: [p.start for p in pieces] for tensor, pieces in self._listed.items()}

    def pieces(self, tensor: str, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces that hold elements ``start`` to ``stop`` of a tensor, in order."""
        part = self._dealt.get(tensor)
        if part is not None:
            end = math.prod(self.shapes[tensor])
            for rank in range(start // part, -(-min(stop, end) // part)):
                yield Piece(rank * part, min(part, end - rank * part), shard_name(rank))
            return
        listed = self._listed.get(tensor, [])
        first = max(0, bisect_right(self._starts.get(tensor, []), start) - 1)
        for piece in listed[first:]:
            if piece.start >= stop:
                return
            if piece.start + piece.length > start:
                yield piece

    def held(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield each file with the fragments (key: elements) that it has to hold."""
        listed: dict[str, dict[str, int]] = {}
        for tensor, pieces in self._listed.items():
            for piece in pieces:
                listed.setdefault(piece.file, {})[f"{tensor}@{piece.start}"] = piece.length
        sizes = {tensor: math.prod(self.shapes[tensor]) for tensor in self._dealt}
        for rank in range(self.document.get("shards", 0)):
            own = listed.pop(shard_name(rank), {})
            for tensor, part in self._dealt.items():
                if part * rank < sizes[tensor]:
                    own[f"{tensor}@{part * rank}"] = min(part, sizes[tensor] - part * rank)
            yield shard_name(rank), own
        yield from listed.items()


def read_index(path: Path) -> Index:
    """Return the index in a file.

    Raises OSError where it cannot be read, ValueError with the reason where it is no index or contradicts itself.
    """
    try:
        document = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict) or document.get("format") not in FORMATS:
        raise ValueError(f"is not of format {FORMAT!r}")
    for key in ("step", "updates"):
        if not _count(document.get(key)):
            raise ValueError(f"{key} is {document.get(key)!r}; it must be a count")
    shapes = document.get("shapes")
    if not isinstance(shapes, dict) or not all(isinstance(s, list) and all(map(_count, s)) for s in shapes.values()):
        raise ValueError("shapes must give each tensor a list of sizes")
    frozen = document.get("frozen")
    if frozen is not None and not (isinstance(frozen, dict) and _count(frozen.get("bytes")) and "sha256" in frozen):
        raise ValueError(f"frozen is {frozen!r}; it must give bytes and sha256 of the frozen weights")
    headers = document.get("headers", {})
    if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
        raise ValueError("headers must give each file the SHA-256 of its header")
    sizes = {tensor: tuple(shape) for tensor, shape in shapes.items()}
    if document["format"] == _FIRST:
        dealt, listed = {}, _first_format(document)
    else:
        dealt, listed = _dealt(document, sizes), _listed(document)
    _require_each_once(sizes, dealt, listed)
    return Index(document, sizes, dealt, listed)


def _dealt(document: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    shards, dealt = document.get("shards"), document.get("dealt")
    if not _count(shards) or not shards:
        raise ValueError(f"shards is {shards!r}; it must be the number of ranks' files")
    if not isinstance(dealt, dict):
        raise ValueError("dealt must give tensors the elements per rank")  # noqa: TRY004  (of a file's content)
    for tensor, part in dealt.items():
        if tensor not in shapes or part != equal_part(math.prod(shapes[tensor]), shards) or not _count(part):
            raise ValueError(f"dealt: {tensor} has {part!r} elements per rank, which is not its size by {shards} ranks")
    return dealt


def _listed(document: dict[str, Any]) -> dict[str, list[Piece]]:
    fragments = document.get("fragments")
    if not isinstance(fragments, dict):
        raise ValueError("fragments must give each tensor a list")  # noqa: TRY004  (of a file's content)
    found: dict[str, list[Piece]] = {}
    for tensor, entries in fragments.items():
        found[tensor] = []
        for entry in _list(entries):
            values = _list(entry)
            if len(values) != 3 or not all(map(_count, values)) or values[2] >= document["shards"]:
                raise ValueError(f"fragment {entry!r} of {tensor} is not [start, length, rank]")
            found[tensor].append(Piece(values[0], values[1], shard_name(values[2])))
    return found


def _first_format(document: dict[str, Any]) -> dict[str, list[Piece]]:
    """``[kind, name, start, length, file]`` of every fragment."""
    found: dict[str, list[Piece]] = {}
    for entry in _list(document.get("fragments")):
        values = _list(entry)
        strings = len(values) == 5 and all(isinstance(values[i], str) for i in (0, 1, 4))
        if not strings or not all(map(_count, values[2:4])):
            raise ValueError(f"fragment {entry!r} is not [kind, name, start, length, file]")
        if Path(values[4]).name != values[4]:
            raise ValueError(f"fragment {entry!r} is in no file of this folder")
        found.setdefault(f"{values[0]}/{values[1]}", []).append(Piece(*values[2:]))
    return found


def _require_each_once(
    shapes: dict[str, tuple[int, ...]], dealt: dict[str, int], listed: dict[str, list[Piece]]
) -> None:
    """Check that fragments cover every tensor from its first element to its last without overlap."""
    for tensor in listed:
        if tensor not in shapes or tensor in dealt:
            raise ValueError(f"{tensor}: has fragments, and {'is dealt too' if tensor in dealt else 'no shape'}")
    for tensor, shape in shapes.items():
        if tensor in dealt:
            continue
        reached = 0
        for piece in sorted(listed.get(tensor, [])):
            if piece.start != reached:
                raise ValueError(f"{tensor}: a fragment begins at {piece.start}, expected {reached}")
            reached += piece.length
        if reached != math.prod(shape):
            raise ValueError(f"{tensor} is incomplete ({reached} of {math.prod(shape)} elements)")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {type(value).__name__}")  # noqa: TRY004  (of a file's content)
    return value
