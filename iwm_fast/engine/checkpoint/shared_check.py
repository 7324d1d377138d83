"""Check the files of a checkpoint on all ranks: each hashes an equal share, and only verdicts are sent.

The first rank chooses the checkpoint. While it does, the others wait for its requests. What one of them finds wrong the
first rank checks again itself: only its own verdict counts as damage, because another host may see another folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iwm_fast.engine.checkpoint.format import FileFault, file_fault
from iwm_fast.engine.distributed.messages import bytes_of_first, reports_to_first
from iwm_fast.engine.distributed.ranks import Ranks, decide
from iwm_fast.errors import UserError

__all__ = ["choose_together", "share_of"]


def choose_together(ranks: Ranks, choose: Callable[[FileFault], Path | None]) -> tuple[Path | None, str | None]:
    """Return (the checkpoint that the first rank's `choose` returns, None or how another rank finds it damaged) on all
    ranks, which all call it.

    choose: gets what looks for a fault in files of a checkpoint. Its UserError ends every rank.
    """
    shared = _SharedCheck(ranks)

    def chosen() -> tuple[Path | None, str | None]:
        try:
            found = choose(shared.fault)
        finally:
            shared.end()
        return found, shared.doubts.get(found)

    if not ranks.first:
        shared.serve()
    return decide(ranks, chosen)


def share_of(files: Mapping[str, Any], rank: int, world: int) -> list[str]:
    """Return the files that a rank hashes: in turn from the largest to the smallest."""
    return sorted(files, key=lambda file: (-_bytes(files[file]), file))[rank::world]


class _SharedCheck:
    """doubts: of a checkpoint that the first rank finds intact, how another does not."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.doubts: dict[Path | None, str] = {}

    def fault(self, path: Path, files: Mapping[str, Any]) -> str | None:
        """On the first rank: `format.file_fault`, by all ranks."""
        self._send(json.dumps([str(path), files]).encode())
        for rank, found in enumerate(self._exchange(path, files)):
            for file, said in found.items():
                wrong = file_fault(path, {file: files[file]})
                if wrong is not None:
                    return wrong
                here, there = (self._ranks.infos[place].name for place in (0, rank))
                self.doubts.setdefault(
                    path,
                    f"{there}: {path}: {said} there, and {here} reads what was written; look at the disk or the mount "
                    "of that host",
                )
        return None

    def serve(self) -> None:
        """On the others: hash what the first rank asks for, until it has chosen."""
        while request := self._send(b""):
            path, files = json.loads(request)
            self._exchange(Path(path), files)

    def end(self) -> None:
        """On the first rank: let the others go on."""
        self._send(b"")

    def _send(self, request: bytes) -> bytes:
        return bytes_of_first(request, self._ranks.rank, self._ranks.world, self._ranks.control)

    def _exchange(self, path: Path, files: Mapping[str, Any]) -> list[dict[str, str]]:
        """What each rank found wrong, file by file; on the first rank."""
        ranks, found = self._ranks, {}
        for file in share_of(files, ranks.rank, ranks.world):
            try:
                wrong = file_fault(path, {file: files[file]})
            except UserError as error:
                wrong = str(error)
            if wrong is not None:
                found[file] = wrong
        reports = reports_to_first(json.dumps(found).encode(), ranks.rank, ranks.world, ranks.control)
        return [json.loads(report) for report in reports]


def _bytes(expected: Any) -> int:
    """The length that a manifest gives of a file; 0 where it gives none, which is a fault then."""
    length = expected.get("bytes") if isinstance(expected, dict) else None
    return length if isinstance(length, int) else 0
