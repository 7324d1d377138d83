"""Files that a later call of a benchmark continues: read, and compared with what is measured now."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iwm_fast.errors import UserError

__all__ = ["earlier", "files_digest", "require_data", "require_different"]


def earlier(file: Path, schema: str) -> dict[str, Any]:
    """Return the document that an earlier call wrote, {} where there is none. UserError where it is another file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); give another file") from error
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise UserError(f"{file}: is not of schema {schema}; give another file")
    return found


def files_digest(folder: Path) -> str:
    """Return a digest of the names and sizes of all files below a folder, through links; contents are not read."""
    found: list[tuple[str, int]] = []
    for place, _, names in os.walk(folder, followlinks=True):
        paths = [Path(place, name) for name in names]
        found += [(str(path.relative_to(folder)), path.stat().st_size) for path in paths if path.is_file()]
    return hashlib.sha256(json.dumps(sorted(found)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def require_data(file: Path, before: dict[str, Any], digest: str) -> None:
    """Raise UserError where a file's results are of other data. Those of earlier versions did not record theirs."""
    if before.get("data", digest) != digest:
        raise UserError(f"{file}: measured on other data (names or sizes of files differ); give another file")


def require_different(what: str, values: Sequence[object]) -> None:
    """Raise UserError where a value comes twice: it would count as two results."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise UserError(f"{what}: {value} is given twice")
