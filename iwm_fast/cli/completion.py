"""Shell completion of configurations and their keys; it runs at each Tab, so it loads no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from iwm_fast.config.schema_table import Row, rows

__all__ = ["config_files", "config_or_overrides", "overrides"]


def config_files(incomplete: str) -> list[str]:
    """Return packaged configurations, YAML files and folders that begin with ``incomplete``."""
    from iwm_fast.config.load import packaged_names

    found = [name for name in packaged_names() if name.startswith(incomplete)]
    folder, _, beginning = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else ".")).expanduser()
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if "/" in incomplete else entry.name
                if entry.name.startswith(beginning) and not entry.name.startswith("."):
                    found += [f"{name}/"] if entry.is_dir() else [name] if name.endswith((".yaml", ".yml")) else []
    except OSError:  # a missing folder
        pass
    return sorted(set(found))


def overrides(incomplete: str) -> list[str]:
    """Return keys with ``=``; of a complete key, or the only one, its values."""
    split = _split_by_bash()
    if split is not None:
        key, value = split
        return [word for row in rows() if row.key == key for word in _values(row) if word.startswith(value)]
    key, equals, _ = incomplete.partition("=")
    found = [row for row in rows() if (row.key == key if equals else row.key.startswith(key))]
    if len(found) != 1:
        return [f"{row.key}=" for row in found]
    (row,) = found
    # Two candidates with the same prefix keep the shell from adding a space after "=".
    words = [*([] if equals else [f"{row.key}="]), *(f"{row.key}={value}" for value in _values(row))]
    return [word for word in words if word.startswith(incomplete)]


def config_or_overrides(incomplete: str) -> list[str]:
    """Return both, for commands whose configuration is optional."""
    keys = overrides(incomplete)
    return keys if "=" in incomplete or _split_by_bash() is not None else [*config_files(incomplete), *keys]


def _split_by_bash() -> tuple[str, str] | None:
    """Return (key, the beginning of its value) if the cursor is behind a key's ``=``, which only bash splits into a
    word of its own.
    """
    words = os.environ.get("COMP_WORDS", "").split()
    place = os.environ.get("COMP_CWORD", "")
    if not place.isdecimal() or not 0 < int(place) <= len(words):
        return None
    before, word = words[: int(place)], [*words, ""][int(place)]
    if word == "=":
        return before[-1], ""
    return (before[-2], word) if before[-1] == "=" and len(before) > 1 else None


def _values(row: Row) -> list[str]:
    """Return the choices of a key, or its default."""
    if row.type == "true or false":
        return ["true", "false"]
    if row.type.startswith("choice") and row.allowed.startswith("one of "):
        return row.allowed.removeprefix("one of ").split(", or ")[0].split(", ")
    if row.default == "required":
        return []
    default = json.loads(row.default)
    return [default if isinstance(default, str) else row.default.replace(", ", ",")]
