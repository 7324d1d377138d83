"""Results as JSON documents with a ``schema`` and the ``environment`` that made them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.file_names import valid_unicode
from iwm_fast.streams import output_closed

__all__ = ["give_result", "json_text", "write_json", "write_result"]


def give_result(
    destination: str | None, kind: str, body: Mapping[str, Any], show: Callable[[], None] | None = None
) -> None:
    """Write a result as `write_result` does, or nowhere (None), then ``show`` it to a person.

    ``show`` prints tables; it is not called for ``-``. A file that cannot be written does not prevent it: the UserError
    comes after.
    """
    failure = None
    if destination is not None:
        try:
            write_result(destination, kind, body)
        except UserError as error:
            failure = error
    if show is not None and destination != "-":
        show()
    if failure is not None:
        raise failure


def write_result(destination: str | Path, kind: str, body: Mapping[str, Any]) -> None:
    """Write ``body`` with its ``schema`` ("iwm-fast-KIND/1") and ``environment`` to a file, or to stdout for ``-``."""
    write_json(destination, {"schema": f"iwm-fast-{kind}/1", "environment": environment(), **body})


def write_json(destination: str | Path, document: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a document to a file, whose folder is made, or to standard output for ``-``.

    The file appears whole or not at all. Where it cannot be written, the document goes to standard output, so that no
    measurement is lost, and UserError is raised.
    """
    text = json_text(document, indent)
    if str(destination) == "-":
        _print(text)
        return
    path = Path(destination)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_text(path, text)
    except OSError as error:
        place = _print(text)
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; the JSON went to {place} instead"
        ) from error


def json_text(document: Mapping[str, Any], indent: int | None = 2) -> str:
    r"""Return a document as JSON in valid UTF-8.

    Non-finite numbers become null, because JSON has no NaN. A byte 0xXX of a file name that is not UTF-8 is ``\udcXX``,
    which Python's json reads as the same name (``os.fsencode`` gives its bytes).
    """
    return valid_unicode(json.dumps(_finite(document), indent=indent, ensure_ascii=False, allow_nan=False)) + "\n"


def _print(text: str) -> str:
    """Print JSON that is valid in the stream's encoding; return which stream took it."""
    stream, place = (sys.stderr, "standard error") if output_closed() else (sys.stdout, "standard output")
    try:
        text.encode(stream.encoding or "ascii", "strict")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2) + "\n"
    stream.write(text)
    stream.flush()
    return place


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
