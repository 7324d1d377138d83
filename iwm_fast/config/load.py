"""From a YAML file and ``key.path=value`` overrides to a validated :class:`Config`, and back to YAML.

An error is one line: the file and line or "command line", the key, what was found, what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iwm_fast.config import yaml_text
from iwm_fast.config.hints import Hint, hint_of
from iwm_fast.config.plugins import named_plugins
from iwm_fast.config.schema import Config
from iwm_fast.config.schema_table import allowed, rows, section_keys, text_keys
from iwm_fast.config.yaml_text import Keys
from iwm_fast.errors import UserError

__all__ = [
    "config_from",
    "dump_config",
    "find_config",
    "load_config",
    "packaged_config",
    "packaged_names",
    "plugins_of",
]

_COMMAND_LINE = "command line"


def _packaged_folder() -> Path:
    """The folder of packaged configurations: in the package, or beside it in a checkout without symbolic links."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def packaged_names() -> list[str]:
    """Return the file names of the packaged configurations, sorted."""
    return sorted(path.name for path in _packaged_folder().glob("*.yaml"))


def packaged_config(name: str) -> Path:
    """Return the path of a packaged configuration: ``demo``, ``demo.yaml`` or ``deepspeed/zero1.json``.

    Raises UserError, which lists the packaged ones, where there is none of that name.
    """
    file = name if name.endswith((".yaml", ".json")) else f"{name}.yaml"
    path = _packaged_folder() / file
    if not path.is_file():
        raise UserError(f"{name}: no such configuration; name a file or one of {', '.join(packaged_names())}")
    return path


def find_config(name: str) -> Path:
    """Return the file of that path, else the packaged configuration of that name, with or without ``configs/``."""
    path = Path(name)
    if path.exists():
        return path
    bare = name.removeprefix("./").removeprefix("configs/")
    if "/" in bare:
        raise UserError(f"{name}: no such file; name another, or one of {', '.join(packaged_names())}")
    return packaged_config(bare)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in ``path`` with ``key.path=value`` overrides applied in order.

    Raises UserError for a file that cannot be read, malformed YAML, a duplicate or unknown key, a value of the wrong
    type or range, and keys that contradict each other.
    """
    values, lines = _read(path)
    return _validated(values, lines, str(path), overrides)


def config_from(values: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of sections as `Config.model_dump` gives them, with ``overrides``; ``where`` names
    their file in errors, which are `load_config`'s.
    """
    return _validated(copy.deepcopy(dict(values)), {}, where, overrides)


def _validated(values: dict[str, Any], lines: dict[Keys, int], path: str, overrides: Sequence[str]) -> Config:
    overridden: set[Keys] = set()
    for text in overrides:
        overridden.add(_override(values, text))
    _drop_replaced(values, overridden)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = _problems(error, values)
        keys, message = problems[0]
        where = _where(path, keys, lines, overridden)
        more = len(problems) - 1
        suffix = "" if not more else f" (and {more} more problem{'s' if more > 1 else ''})"
        raise UserError(": ".join(part for part in (where, ".".join(keys), message) if part) + suffix) from error


def plugins_of(overrides: Sequence[str]) -> list[str]:
    """The plugins that ``key.path=value`` words name, before they are applied to a configuration."""
    given = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == "plugins"]
    return list(named_plugins(yaml_text.parse_value(given[-1], f"{_COMMAND_LINE}: plugins"))) if given else []


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML, which :func:`load_config` reads back equal."""
    return yaml_text.dump(config.model_dump(mode="json"))


def _read(path: Path) -> tuple[dict[str, Any], dict[Keys, int]]:
    """Return (values, line of each key) of a YAML file; an empty section is an empty mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; a configuration is a YAML file") from error
    values, lines = yaml_text.parse(text, str(path), texts={tuple(key.split(".")) for key in text_keys()})
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: holds {_shown(values)}; a configuration is a mapping of {', '.join(Config.model_fields)}"
        )
    _fill_empty_sections(values, ())
    return values, lines


def _fill_empty_sections(values: dict[str, Any], keys: Keys) -> None:
    """Replace null sections, whose keys are all commented out, by empty mappings."""
    for key, value in values.items():
        if value is None and ".".join((*keys, key)) in section_keys():
            values[key] = {}
        elif isinstance(value, dict):
            _fill_empty_sections(value, (*keys, key))


def _override(values: dict[str, Any], text: str) -> Keys:
    """Apply one ``key.path=value`` to ``values`` in place; return the key."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"{_COMMAND_LINE}: {_shown(text)}: not an override; write key.path=value, as train.lr=1e-3")
    if key in section_keys():
        raise UserError(f"{_COMMAND_LINE}: {key}: a section; override one key at a time, as {_first_key(key)}=...")
    keys = tuple(key.split("."))
    if not any(row.key == key for row in rows()):
        raise UserError(f"{_COMMAND_LINE}: {key}: {_unknown(keys)}")
    below = values
    for part in keys[:-1]:
        if not isinstance(below.get(part), dict):
            below[part] = {}
        below = below[part]
    below[keys[-1]] = _given(key, value)
    return keys


def _drop_replaced(values: dict[str, Any], overridden: set[Keys]) -> None:
    """Drop the file's value in another unit of a key that an override sets: train.warmup for train.warmup_epochs."""
    for name, field in Config.model_fields.items():
        for group in getattr(field.annotation, "alternatives", ()):
            said = [key for key in group if (name, key) in overridden]
            if any(values[name][key] is not None for key in said):
                for key in set(group) - set(said):
                    values[name].pop(key, None)


def _given(key: str, value: str) -> Any:
    """The value after ``key=``: as it is for a key that holds text, else parsed as YAML."""
    if key not in text_keys():
        return yaml_text.parse_value(value, f"{_COMMAND_LINE}: {key}")
    nullable = text_keys()[key]
    if not value:
        raise UserError(f"{_COMMAND_LINE}: {key}: empty; give a value after ={', or null' if nullable else ''}")
    return None if nullable and value == "null" else value


def _first_key(section: str) -> str:
    return next(row.key for row in rows() if row.key.startswith(f"{section}."))


def _where(path: str, keys: Keys, lines: dict[Keys, int], overridden: set[Keys]) -> str:
    """The file and line, or the command line, that ``keys`` come from; both for a contradiction between them."""
    if any(keys[: len(o)] == o for o in overridden):
        return _COMMAND_LINE
    here = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    file = path if here is None else f"{path}:{here}"
    return f"{file} and {_COMMAND_LINE}" if any(o[: len(keys)] == keys for o in overridden) else file


def _problems(error: ValidationError, values: dict[str, Any]) -> list[tuple[Keys, str]]:
    """(keys, message) of each problem that pydantic found; unknown keys come first, because they often cause others."""
    found: list[tuple[bool, Keys, str]] = []
    for problem in error.errors(include_url=False):
        # Pydantic puts a union's alternatives (an encoder's name or its shape) into the location; keys have no "[".
        location = tuple(part for part in problem["loc"] if not (isinstance(part, str) and "[" in part))
        kind, in_union = problem["type"], len(location) < len(problem["loc"])
        if in_union and (kind == "model_type" or (kind == "string_type" and isinstance(problem["input"], dict))):
            continue  # the other alternative
        keys = tuple(str(part) for part in location)
        in_list = bool(location) and isinstance(location[-1], int)
        if in_list:
            keys = keys[:-1]
        if kind == "extra_forbidden":
            found.append((False, keys, _unknown(keys)))
        elif kind == "missing" and not in_list:
            found.append((True, keys, f"missing; give {allowed('.'.join(keys))}"))
        elif kind == "value_error":
            found.append((True, keys, str(problem["ctx"]["error"])))
        else:
            found.append((True, keys, f"found {_shown(_value_at(values, keys))}; allowed: {allowed('.'.join(keys))}"))
    return [(keys, message) for _, keys, message in sorted(found, key=lambda item: item[0])]


def _unknown(keys: Keys) -> str:
    """Suggest a key for an unknown one: by another framework's name, a similar sibling, or the same name elsewhere."""
    known = sorted({row.key for row in rows()} | section_keys())
    if ".".join(keys) in known:
        return f"dotted keys are for the command line; in a file write {_nested(keys)}"
    prefix = ".".join((*keys[:-1], ""))
    siblings = {
        key.removeprefix(prefix): key for key in known if key.startswith(prefix) and "." not in key[len(prefix) :]
    }
    hint = hint_of(keys[-1])
    if hint is not None:
        return f"unknown key; {_hinted(hint, siblings)}"
    near = [siblings[name] for name in difflib.get_close_matches(keys[-1], siblings, n=1)]
    same_name = [key for key in known if key.rsplit(".", 1)[-1] == keys[-1]]
    near += difflib.get_close_matches(".".join(keys), same_name, n=1, cutoff=0.0)
    near += difflib.get_close_matches(".".join(keys), known, n=1)
    return (
        f"unknown key; did you mean {near[0]}?" if near else f"unknown key; choose from {', '.join(siblings) or 'none'}"
    )


def _nested(keys: Keys) -> str:
    """A dotted key as nested YAML."""
    *sections, key = ".".join(keys).split(".")
    return "".join(f"{section}: {{" for section in sections) + f"{key}: ..." + "}" * len(sections)


def _hinted(hint: Hint, siblings: dict[str, str]) -> str:
    """The suggestion of a hint; among keys of one name, the sibling of the unknown key."""
    note = f" ({hint.note})" if hint.note else ""
    for key in hint.keys:
        beside = siblings.get(key.rsplit(".", 1)[-1])
        if beside is not None and beside != key:
            return f"did you mean {beside}?"
    if hint.keys:
        return f"did you mean {hint.keys[0]}?{note}"
    return hint.note or f"use the option {' or '.join(hint.options)} of the command line"


def _value_at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values[key] if isinstance(values, dict) else values
    return values


def _shown(value: Any) -> str:
    """A value as JSON, which tells text from numbers, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
