"""What the shell's completion offers for configurations and their keys; asked at each Tab, so it loads no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from iwm_fast.config.schema_table import Row, rows

__all__ = ["config_files", "config_or_overrides", "overrides"]


def config_files(incomplete: str) -> list[str]:
    """The packaged configurations, and YAML files and folders that begin so."""
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
    except OSError:  # a folder that is not there has nothing to offer
        pass
    return sorted(set(found))


def overrides(incomplete: str) -> list[str]:
    """Keys with ``=`` behind them; of a key that is whole, or the only one, what may stand there."""
    split = _split_by_bash()
    if split is not None:
        key, value = split
        return [word for row in rows() if row.key == key for word in _values(row) if word.startswith(value)]
    key, equals, _ = incomplete.partition("=")
    found = [row for row in rows() if (row.key == key if equals else row.key.startswith(key))]
    if len(found) != 1:
        return [f"{row.key}=" for row in found]
    (row,) = found
    # Two words of one beginning keep the shell from ending the word with a space behind the sign.
    words = [*([] if equals else [f"{row.key}="]), *(f"{row.key}={value}" for value in _values(row))]
    return [word for word in words if word.startswith(incomplete)]


def config_or_overrides(incomplete: str) -> list[str]:
    """Both, where a configuration may be left out."""
    keys = overrides(incomplete)
    return keys if "=" in incomplete or _split_by_bash() is not None else [*config_files(incomplete), *keys]


def _split_by_bash() -> tuple[str, str] | None:
    """(key, what stands of its value) where the cursor is behind a key's ``=``, which bash takes for a word of its own
    and other shells do not.
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
    """The choices of a key, or its default."""
    if row.type == "true or false":
        return ["true", "false"]
    if row.type.startswith("choice") and row.allowed.startswith("one of "):
        return row.allowed.removeprefix("one of ").split(", or ")[0].split(", ")
    if row.default == "required":
        return []
    default = json.loads(row.default)
    return [default if isinstance(default, str) else row.default.replace(", ", ",")]
