"""Results as JSON documents: every one says what it is (``schema``) and what it was made with (``environment``)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iwm_fast.data.whole import write_whole_text
from iwm_fast.errors import UserError
from iwm_fast.planning.environment import environment

__all__ = ["write_result"]


def write_result(destination: str, kind: str, body: Mapping[str, Any]) -> None:
    """Write ``body`` with its ``schema`` ("iwm-fast-KIND/1") and ``environment`` to a file, or to stdout for ``-``.

    The file appears whole or not at all. Numbers that are not finite become null: JSON has no NaN.
    Raises UserError when it cannot be written.
    """
    document = {"schema": f"iwm-fast-{kind}/1", "environment": environment(), **body}
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    path = Path(destination)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
