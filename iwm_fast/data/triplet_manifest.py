"""Read a manifest of triplets as rows: JSON Lines or Parquet, with the header that describes its actions.

`triplets` interprets the rows. `write_manifest` writes JSON Lines, the header first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iwm_fast.config.schema import ExternalActions
from iwm_fast.errors import UserError

__all__ = ["SCHEMA", "Line", "header_of", "lines_of", "write_manifest"]

SCHEMA = "iwm-fast-triplets/1"
_HEADER_KEYS = ("schema", "actions")
_ACTION_KEYS = ("kind", "count", "names", "low", "high", "neutral")


@dataclass(frozen=True)
class Line:
    """One row and its number: "line 7" of a text, "row 7" of a table; both count from 1."""

    manifest: Path
    number: int
    row: dict[str, Any]

    @property
    def where(self) -> str:
        """The row's place in the file."""
        return f"{'row' if self.manifest.suffix == '.parquet' else 'line'} {self.number}"

    def error(self, message: str) -> UserError:
        """Return an error that begins with the file and line."""
        return UserError(f"{self.manifest}:{self.number}: {message}")

    def found(self, key: str, allowed: str) -> UserError:
        """Return an error with the value at a key, and what is allowed."""
        shown = json.dumps(self.row[key], ensure_ascii=False, default=str)
        return self.error(f"{key}: found {shown if len(shown) <= 60 else shown[:57] + '...'}; allowed: {allowed}")


def lines_of(manifest: Path) -> Iterator[Line]:
    """Return the rows of a manifest without its header. Raises UserError where it cannot be read, or a line is
    no object.
    """
    if manifest.suffix == ".parquet":
        yield from (Line(manifest, number, row) for number, row in enumerate(_table(manifest), start=1))
        return
    for number, row in _objects(manifest):
        if not (number == 1 and "schema" in row):
            yield Line(manifest, number, row)


def header_of(manifest: Path) -> ExternalActions | None:
    """Return the description of the actions, from a first line with the key schema, or from NAME.actions.json beside
    NAME; or None.

    Raises UserError where both exist, or one is wrong.
    """
    beside = manifest.with_suffix(".actions.json")
    first = None
    if manifest.suffix != ".parquet":
        number, row = next(iter(_objects(manifest)), (0, {}))
        first = row if number == 1 and "schema" in row else None
    if not beside.exists():
        return None if first is None else _actions(f"{manifest}:1", first)
    if first is not None:
        raise UserError(f"{manifest}:1: a header, and {beside.name} beside it is another; keep one of them")
    try:
        described = json.loads(_text(beside))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{beside}: not JSON: {error}") from error
    if not isinstance(described, dict):
        raise UserError(f"{beside}: found {described!r}; allowed: an object with {' and '.join(_HEADER_KEYS)}")
    return _actions(str(beside), described)


def write_manifest(path: Path, actions: ExternalActions, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest in JSON Lines, its header first. Raises OSError where it cannot be written."""
    described = {key: value for key, value in actions.model_dump(mode="json").items() if value}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"schema": SCHEMA, "actions": described}) + "\n")
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _actions(where: str, described: dict[str, Any]) -> ExternalActions:
    """The header's description with its defaults."""
    if described.get("schema") != SCHEMA:
        raise UserError(f"{where}: schema: found {described.get('schema')!r}; allowed: {SCHEMA!r}")
    actions = described.get("actions")
    if set(described) != set(_HEADER_KEYS) or not isinstance(actions, dict):
        raise UserError(f"{where}: a header has schema, and actions: an object; found {', '.join(map(str, described))}")
    unknown = [key for key in actions if key not in _ACTION_KEYS]
    if unknown:
        raise UserError(f"{where}: actions: unknown key {unknown[0]!r}; allowed: {', '.join(_ACTION_KEYS)}")
    values = _filled(where, actions)
    try:
        return ExternalActions.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        reason = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
        raise UserError(f"{where}: actions: {key + ': ' if key else ''}{reason}") from error


def _filled(where: str, actions: dict[str, Any]) -> dict[str, Any]:
    values = dict(actions)
    count = values.pop("count", None)
    names = values.get("names")
    if values.get("kind") == "discrete":
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise UserError(f"{where}: actions.count: found {count!r}; allowed: a whole number of at least 1")
        if names is None and count is not None:
            values["names"] = [str(choice) for choice in range(count)]
        elif count is not None and isinstance(names, list) and len(names) != count:
            raise UserError(f"{where}: actions: count is {count}, and there are {len(names)} names")
    elif count is not None:
        raise UserError(f"{where}: actions.count: for discrete actions only; allowed here: names, low, high, neutral")
    elif "neutral" not in values and _lists_of_numbers(values.get("low"), values.get("high")):
        pairs = zip(values["low"], values["high"], strict=True)
        values["neutral"] = [0.0 if low <= 0 <= high else low + (high - low) / 2 for low, high in pairs]
    return values


def _lists_of_numbers(*lists: Any) -> bool:
    """Lists of numbers, all equally long."""
    return all(isinstance(one, list) and all(isinstance(v, int | float) for v in one) for one in lists) and (
        len({len(one) for one in lists}) == 1
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error


def _objects(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered lines of a JSON Lines file without empty ones."""
    try:
        with manifest.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{manifest}:{number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{manifest}:{number}: found {text.strip()[:60]}; allowed: one object per line")
                yield number, row
    except OSError as error:
        raise UserError(f"{manifest}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest}: not UTF-8 text; a manifest is JSON Lines or Parquet") from error


def _table(manifest: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file; a missing value has no key."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{manifest}: Parquet is read by pyarrow: pip install 'iwm-fast[parquet]'") from error
    try:
        rows = pyarrow.parquet.read_table(manifest).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{manifest}: cannot be read as Parquet: {reason}") from error
    return [{key: value for key, value in row.items() if value is not None} for row in rows]
