"""The schema as a table: one row per key, with its type, default, allowed values and meaning.

The rows are read from the pydantic models (through their JSON schema), so that the table, the errors and the checks
cannot disagree.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iwm_fast.config.schema import Config, EncoderShape, ExternalActions, Section
from iwm_fast.config.sections.model import TargetEncoderConfig

__all__ = ["Row", "allowed", "rows", "section_keys", "text_keys"]


# Words for JSON Schema's types.
_NUMBERS = {"integer": "whole number", "number": "number"}
_PLAIN = {"boolean": "true or false", "string": "text", "null": "null"}
# Keys whose value may be a mapping, and the mapping's schema.
_MAPPINGS: dict[str, type[Section]] = {
    "model.encoder": EncoderShape,
    "model.target_encoder": TargetEncoderConfig,
    "model.target_encoder.encoder": EncoderShape,
    "actions.external": ExternalActions,
}


@dataclass(frozen=True)
class Row:
    """One key of a configuration. ``default`` is JSON text, so that null, text and numbers look different."""

    key: str
    type: str
    default: str
    allowed: str
    description: str


def _number(value: float) -> str:
    """Return a limit as text; whole numbers with all their digits."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def _bounds(field: dict[str, Any], noun: str) -> str:
    """Return a number's range in words."""
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    parts = []
    if low is not None and high is not None:
        parts.append(f"from {_number(low)} to {_number(high)}")
    elif low is not None:
        parts.append(f"of at least {_number(low)}")
    elif high is not None:
        parts.append(f"of at most {_number(high)}")
    if above is not None:
        parts.append(f"above {_number(above)}")
    if below is not None:
        parts.append(f"below {_number(below)}")
    return " ".join([noun, " and ".join(parts)]) if parts else noun


def _words(field: dict[str, Any]) -> tuple[str, str]:
    """Return (type, allowed values) of a field of the JSON schema."""
    if "anyOf" in field:
        pairs = [_words(choice) for choice in field["anyOf"]]
        return " or ".join(kind for kind, _ in pairs), ", or ".join(values for _, values in pairs)
    if "$ref" in field:
        mapping = next(m for m in _MAPPINGS.values() if m.__name__ == field["$ref"].rsplit("/", 1)[-1])
        return "mapping", f"a mapping {{{', '.join(mapping.model_fields)}}}"
    if "enum" in field:
        return "choice", "one of " + ", ".join(str(value) for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            whole = all(item.get("type") == "integer" for item in field["prefixItems"])
            return "pair", f"a list of {len(field['prefixItems'])} {'whole ' if whole else ''}numbers [first, last]"
        return "list", f"a list of {_words(field['items'])[1].removeprefix('one of ')}"
    if kind in _NUMBERS:
        return _NUMBERS[kind], _bounds(field, f"a {_NUMBERS[kind]}")
    if kind in _PLAIN:
        return _PLAIN[kind], _PLAIN[kind]
    raise TypeError(f"no words for the schema {field}")


def _section_rows(prefix: str, section: dict[str, Any], definitions: dict[str, Any]) -> list[Row]:
    """Return the rows of a section and its subsections, in order of declaration."""
    found: list[Row] = []
    for name, field in section["properties"].items():
        key = f"{prefix}{name}"
        if "$ref" in field:
            found += _section_rows(f"{key}.", definitions[field["$ref"].rsplit("/", 1)[-1]], definitions)
            continue
        kind, values = _words(field)
        default = json.dumps(field["default"], ensure_ascii=False) if "default" in field else "required"
        found.append(Row(key, kind, default, values, field.get("description", "")))
    return found


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return every key of a configuration; the keys of an optional mapping follow its own."""
    schema = Config.model_json_schema()
    return tuple(_with_mappings(_section_rows("", schema, schema["$defs"]), schema["$defs"]))


def _with_mappings(found: list[Row], definitions: dict[str, Any]) -> Iterator[Row]:
    """Each row, and after it those of the mapping that its value may be."""
    for row in found:
        yield row
        if row.key in _MAPPINGS:
            inner = _section_rows(f"{row.key}.", definitions[_MAPPINGS[row.key].__name__], definitions)
            yield from _with_mappings(inner, definitions)


@functools.cache
def section_keys() -> frozenset[str]:
    """Return the keys of sections: ``train``, ``model.predictor`` and so on."""
    keys = {row.key.rsplit(".", 1)[0] for row in rows() if "." in row.key} | {
        row.key.split(".", 1)[0] for row in rows() if "." in row.key
    }
    return frozenset(keys - _MAPPINGS.keys())


@functools.cache
def text_keys() -> dict[str, bool]:
    """Return the keys whose value is any text (a path, a name), and whether each may be null."""
    kinds = {row.key: row.type.split(" or ") for row in rows()}
    return {key: "null" in kind for key, kind in kinds.items() if set(kind) <= {"text", "null"}}


def allowed(key: str) -> str:
    """Return the allowed values of an existing key, in words."""
    if key in section_keys():
        return "a section (a mapping of keys)"
    return next(row.allowed for row in rows() if row.key == key)
