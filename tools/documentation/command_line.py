"""docs/reference/command_line.md: every command with its arguments and options, from the functions' annotations."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from iwm_fast.cli.main import app
from tools.documentation.markdown import GENERATED, from_docstring, table

__all__ = ["page"]

_HEAD = f"""# Command line

{GENERATED} `iwm-fast COMMAND --help` prints the same. `python -m iwm_fast` is `iwm-fast`.

| for every command | |
|---|---|
| `--help` | what the command does, its arguments and options |
| `--version` | the version, before a command |
| `--install-completion` | complete commands, options, configurations, keys and values in bash, zsh or fish |
| `--show-completion` | print the script of completion instead |
| `--debug` | show the traceback of an error |
| exit code 0 | done |
| exit code 1 | a check failed: a bad file, a slower row, a measure that could not be run |
| exit code 2 | an error, in one line |
"""


def _commands(of: typer.Typer, words: tuple[str, ...] = ()) -> Iterator[tuple[str, CommandInfo]]:
    """Every command with the words that call it, the top level first."""
    for command in of.registered_commands:
        if not command.hidden and command.callback is not None:
            name = command.name or command.callback.__name__.replace("_", "-")
            yield " ".join((*words, name)), command
    for group in of.registered_groups:
        if group.typer_instance is not None:
            below = (*words, group.name) if isinstance(group.name, str) else words
            yield from _commands(group.typer_instance, below)


def _plain(kind: Any) -> Any:
    """A type without None, lists and annotations around it."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return _plain(next(one for one in get_args(kind) if one is not type(None)))
    return _plain(get_args(kind)[0]) if get_origin(kind) is list else kind


def _value(kind: Any, info: OptionInfo) -> str:
    """What an option is followed by, in words."""
    plain = _plain(kind)
    if plain is bool:
        return ""
    if get_origin(plain) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(plain))
    if get_origin(plain) is tuple:
        return f"{len(get_args(plain))} numbers" if info.metavar is None else f"`{info.metavar}`"
    low, high = (None if end is None else f"{end:g}" for end in (info.min, info.max))
    number = {int: "whole number", float: "number"}.get(plain)
    if number is not None:
        limits = f"{low} to {high}" if low and high else f"{low} or more" if low else f"{high} or less" if high else ""
        return ", ".join(filter(None, (number, limits)))
    return f"`{info.metavar or ('PATH' if plain is Path else 'TEXT')}`"


def _default(value: Any) -> str:
    if value is None or value is False or value is inspect.Parameter.empty or value == []:
        return "required" if value is inspect.Parameter.empty else ""
    if isinstance(value, tuple | list):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def _entry(words: str, command: CommandInfo) -> list[str]:
    function = command.callback
    assert function is not None
    hints = get_type_hints(function, include_extras=True)
    synopsis, arguments, options = [f"iwm-fast {words}"], [], []
    for name, parameter in inspect.signature(function).parameters.items():
        infos = getattr(hints[name], "__metadata__", None) or next(
            (one.__metadata__ for one in get_args(hints[name]) if hasattr(one, "__metadata__")), ()
        )
        info = next(one for one in infos if isinstance(one, OptionInfo | ArgumentInfo))
        if info.hidden:
            continue
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or name.upper()
            required = parameter.default is parameter.empty
            synopsis.append(shown if required else f"[{shown}]")
            arguments.append((f"`{shown}`", info.help or ""))
            continue
        declared = info.param_decls or (f"--{name.replace('_', '-')}",)
        shown = ", ".join(f"`{one}`" for one in declared)
        options.append((shown, _value(hints[name], info), _default(parameter.default), info.help or ""))
        if parameter.default is parameter.empty:
            synopsis.append(f"{declared[0]} {info.metavar or name.upper()}")
    if options:
        synopsis.append("[OPTIONS]")
    lines = [f"## {words}", "", "```sh", " ".join(synopsis), "```", "", _says(command)]
    if arguments:
        lines += ["", *table(("argument", "meaning"), arguments)]
    if options:
        lines += ["", *table(("option", "value", "default", "meaning"), options)]
    if command.epilog:
        lines += ["", "```sh", *_examples(command.epilog), "```"]
    return [*lines, ""]


def _examples(epilog: str) -> list[str]:
    """The commands of "Example: …    or: …", one per line."""
    return [f"iwm-fast {re.split(' {4,}', part)[0].strip()}" for part in epilog.split("iwm-fast ")[1:]]


def _says(command: CommandInfo) -> str:
    return from_docstring(command.help or getattr(command.callback, "__doc__", None))


def page() -> str:
    """The Markdown."""
    commands = list(_commands(app))
    found = [line for words, command in commands for line in _entry(words, command)]
    cells = [
        (f"[`{words}`](#{words.replace(' ', '-')})", _says(command).partition("\n\n")[0]) for words, command in commands
    ]
    return "\n".join([_HEAD, *table(("command", "what it does"), cells), "", *found]).rstrip() + "\n"
