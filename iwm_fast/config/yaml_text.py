"""YAML with version 1.2's plain scalars, no duplicate keys, and the line of each key.

PyYAML follows YAML 1.1, where ``1e-3`` is a string, ``on`` is true, ``1:30`` is ninety and ``017`` is fifteen.
:func:`parse` reads what :func:`dump` writes back equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from typing import Any

import yaml

from iwm_fast.errors import UserError

__all__ = ["Keys", "dump", "parse", "parse_value"]

Keys = tuple[str, ...]

# A configuration is three levels deep. The bound also ends an anchor that contains itself.
_MAX_DEPTH = 16

_PLAIN_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_PLAIN_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's core scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced not shared


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes exactly the strings that the loader would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as above


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(loader.construct_scalar(node))
    except ValueError as error:  # Python reads up to 4,300 digits
        raise yaml.constructor.ConstructorError(None, None, "too large a number", node.start_mark) from error


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    value = float(loader.construct_scalar(node))
    if math.isinf(value):
        raise yaml.constructor.ConstructorError(None, None, f"{node.value} is too large a number", node.start_mark)
    return value


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # YAML folds line breaks, of which \n is one of several: what is not printable is escaped between double quotes.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_SCALARS = [re.compile(rf"^(?:{pattern})$") for _, pattern, _ in _PLAIN_SCALARS]
for _kind, _pattern, _first in _PLAIN_SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _convert(loader: _Loader, node: yaml.Node, keys: Keys, lines: dict[Keys, int], name: str, texts: Set[Keys]) -> Any:
    """A node's plain value; notes the line of every key below it in ``lines``."""
    if len(keys) > _MAX_DEPTH:
        raise UserError(f"{name}:{node.start_mark.line + 1}: nested more than {_MAX_DEPTH} levels deep; flatten it")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_COLLECTIONS:
        raise UserError(f"{name}:{node.start_mark.line + 1}: unknown tag {node.tag}; remove it")
    if isinstance(node, yaml.SequenceNode):
        return [_convert(loader, item, (*keys, str(i)), lines, name, texts) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        is_text = keys in texts and node.tag != "tag:yaml.org,2002:null"
        return node.value if is_text else loader.construct_object(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{name}:{line}: the key is a list or mapping; write it as plain text")
        if key in values:
            first = lines[(*keys, key)]
            raise UserError(f"{name}:{line}: {'.'.join((*keys, key))}: given twice, first on line {first}; keep one")
        lines[(*keys, key)] = line
        values[key] = _convert(loader, value_node, (*keys, key), lines, name, texts)
    return values


def parse(
    text: str, name: str, *, numbered: bool = True, texts: Set[Keys] = frozenset()
) -> tuple[Any, dict[Keys, int]]:
    """Return (value, line of each key) of a YAML document.

    ``name``: the file in errors, followed by the line where ``numbered``. ``texts``: keys whose scalars stay text even
    where they look like a number or a flag; null stays null. Raises UserError for malformed text, a duplicate key or an
    unknown tag.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Keys, int] = {}
            return (None if node is None else _convert(loader, node, (), lines, name, texts)), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if numbered and mark is not None else name
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{name}: not valid YAML: {error.reason} at character {error.position}") from error


def parse_value(text: str, name: str) -> Any:
    """Return the value of one scalar, list or mapping after ``=`` on the command line.

    Text that begins with a bracket, a brace or a quote is YAML; a number, a flag or null is itself. All else stays text
    with its ``#``, ``: ``, ``!`` and ``*``.
    """
    bare = text.strip()
    if bare.startswith(("[", "{", "'", '"')) or any(pattern.match(bare) for pattern in _SCALARS):
        return parse(text, name, numbered=False)[0]
    return bare


def dump(values: dict[str, Any]) -> str:
    """Return YAML text in the mapping's own order, short lists on one line."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
