"""docs/reference/python.md: `iwm_fast.load` and what it returns, from the docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import iwm_fast
from iwm_fast import api
from iwm_fast.errors import UserError
from tools.documentation.markdown import GENERATED, from_docstring

__all__ = ["page"]


def _code(text: str) -> str:
    """The indented blocks of a docstring as fenced Python."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        code = line.startswith("    ") or (inside and not line.strip())
        if code != inside and (code or line.strip()):
            found.append("```python" if code else "```\n")
            inside = code
        if not (inside and not line.strip()):
            found.append(line.removeprefix("    ") if inside else line)
    return "\n".join([*found, "```"] if inside else found)


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Name and arguments with their types as they are written; a line each where one line is too long."""
    parts: list[str] = []
    keyword_only = False
    for argument in inspect.signature(function).parameters.values():
        if argument.name == "self":
            continue
        if argument.kind is argument.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        default = "" if argument.default is argument.empty else f" = {argument.default!r}"
        parts.append(f"{argument.name}: {argument.annotation}{default}")
    returned = inspect.signature(function).return_annotation
    line = f"{name}({', '.join(parts)}) -> {returned}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n) -> {returned}"


def _entry(name: str, function: Callable[..., Any]) -> list[str]:
    return ["```python", _signature(name, function), "```", "", _code(from_docstring(function.__doc__)), ""]


def page() -> str:
    """The Markdown."""
    lines = ["# Python", "", GENERATED, "", _code(from_docstring(api.__doc__)), "", "## iwm_fast.load", ""]
    lines += _entry("iwm_fast.load", iwm_fast.load)
    lines += _class("world", api.WorldModel)
    for kind in (api.Ranking, api.Inferred, api.Plan):
        lines += _answer(kind)
    lines += [*_class("finetuned", api.FinetunedModel), *_answer(api.Classified)]
    lines += ["## iwm_fast.errors.UserError", "", from_docstring(UserError.__doc__)]
    return "\n".join(lines).rstrip() + "\n"


def _class(called: str, kind: type) -> list[str]:
    """A class and its public members; ``called``: an object of it in the examples."""
    lines = [f"## {kind.__name__}", "", from_docstring(kind.__doc__), ""]
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        # The second class with a method of one name gets headings of its own: links to the first stay.
        lines += [f"### {name}" if kind is api.WorldModel else f"### {called}.{name}", ""]
        if isinstance(member, property):
            assert member.fget is not None
            returned = inspect.signature(member.fget).return_annotation
            lines += ["```python", f"{called}.{name} -> {returned}", "```", "", from_docstring(member.fget.__doc__), ""]
        else:
            lines += _entry(f"{called}.{name}", inspect.unwrap(member))
    return lines


def _answer(kind: type) -> list[str]:
    """A class of fields."""
    lines = [f"## {kind.__name__}", "", "```python"]
    lines += [f"{name}: {annotation}" for name, annotation in kind.__annotations__.items()]
    return [*lines, "```", "", from_docstring(kind.__doc__), ""]
