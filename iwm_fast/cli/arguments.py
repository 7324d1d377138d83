"""Prepare the command line's arguments for the parser: remove what launchers add, and move global options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from iwm_fast.config.base import home_expanded
from iwm_fast.config.hints import canonical, hint_of
from iwm_fast.config.schema_table import rows
from iwm_fast.errors import UserError

__all__ = ["check_options", "config_and_overrides", "prepare"]

# An override, not a file: "=" before any slash.
_OVERRIDE = re.compile(r"[^-/=][^/=]*=")
_NUMBER = re.compile(r"-\.?\d")


def prepare(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return (arguments for the parser, whether ``--debug`` was among them).

    - ``--debug`` may stand before the command or after it.
    - ``--local_rank=N`` (added by deepspeed's launcher) is dropped: the engine reads LOCAL_RANK, which is set too.
    - ``--json`` with no file after it becomes ``--json -``, standard output. It is bare at the end of the line, before
      another option and before an override (``key=value``, the sign before any slash); elsewhere what follows is its
      file, as after ``--json=``.
    - ``~`` at the beginning of a word, or of an option's value after ``=``, is the home folder: no shell expands the
      second.
    """
    kept: list[str] = []
    rest = list(arguments)
    debug = False
    while rest:
        word = rest.pop(0)
        if word == "--":
            kept += [word, *rest]
            break
        if word == "--debug":
            debug = True
        elif word in ("--local_rank", "--local-rank"):
            rest = rest[1:]
        elif word.startswith(("--local_rank=", "--local-rank=")):
            continue
        elif word == "--json" and (not rest or not _is_file(rest[0])):
            kept += [word, "-"]
        else:
            kept.append(_at_home(word))
    return kept, debug


def _is_file(word: str) -> bool:
    """Return whether the word after a bare ``--json`` is its file."""
    return word == "-" or not (word.startswith("-") or _OVERRIDE.match(word))


def _at_home(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        return f"{option}{equals}{home_expanded(value)}"
    except ValueError as error:
        raise UserError(f"command line: {error}") from error


def check_options(command: Any, words: Sequence[str]) -> None:
    """Raise UserError for an option without its value, for an empty word (often an unset variable of the shell, which
    would be the folder ``.``), and for an option that other programs have, with what to write here.

    command: what the parser makes of the program (a group of commands). Other mistakes are left to the parser.
    """
    rest, path = list(words), ["iwm-fast"]
    while hasattr(command, "commands"):
        while rest and rest[0].startswith("-"):
            rest.pop(0)
        if not rest or rest[0] not in command.commands:
            return
        path.append(rest[0])
        command = command.commands[rest.pop(0)]
    options = {name: option for option in command.params for name in option.opts if name.startswith("-")}
    overridable = any(getattr(option, "metavar", None) and "KEY.PATH" in option.metavar for option in command.params)
    for word, following in _own_words(rest, options):
        if not word:
            raise UserError(
                f"{' '.join(path)}: an argument is empty (an unset shell variable?); give it, or leave it out"
            )
        name, equals, value = word.partition("=")
        if name in options:
            _require_value(name, options, [value] if equals else following, joined=bool(equals))
        elif name != "--help":
            instead = _instead(name, value if equals else _value(following), options, overridable=overridable)
            if instead:
                raise UserError(f"{name}: no such option of {' '.join(path)}; {instead}")


def _own_words(words: Sequence[str], options: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield words that are options or empty, each with the words after it; values of options are skipped."""
    at = 0
    while at < len(words) and words[at] != "--":
        word = words[at]
        at += 1
        if word and (not word.startswith("-") or word == "-" or _NUMBER.match(word)):
            continue
        yield word, list(words[at:])
        if word in options and not options[word].is_flag:
            at += options[word].nargs


def _require_value(name: str, options: dict[str, Any], following: list[str], *, joined: bool) -> None:
    option = options[name]
    if option.is_flag:
        return
    what = f" ({option.metavar})" if option.metavar else ""
    if not following or (not joined and following[0].partition("=")[0] in options):
        found = f"; {following[0]} follows it" if following else ""
        raise UserError(f"{name}: needs a value{what}{found}")
    if not following[0]:
        instead = "" if option.required else f", or leave {name} out"
        raise UserError(f"{name}: empty (an unset shell variable?); give a value{what}{instead}")


def _value(following: list[str]) -> str:
    """Return the word after an unknown option, if it may be its value."""
    word = following[0] if following else ""
    return "..." if not word or word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")) else word


def _instead(name: str, value: str, options: dict[str, Any], *, overridable: bool) -> str | None:
    """Return what to write instead of an unknown option, if known."""
    bare = name.lstrip("-")
    keys = [row.key for row in rows()]
    if bare in keys:
        return f"write {bare}={value}, without dashes" if overridable else None
    hint = hint_of(bare)
    note = f" ({hint.note})" if hint and hint.note else ""
    for option in hint.options if hint else ():
        if option in options:
            return f"use {option}"
    ours = list(hint.keys) if hint else [key for key in keys if canonical(key) == canonical(bare)]
    if ours and overridable:
        return f"write {ours[0]}={value}{note}"
    return hint.note if hint and hint.note and not ours else None


def config_and_overrides(words: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Split words into an optional CONFIG and the ``key=value`` words after it.

    Raise UserError for a second word that is not an override.
    """
    config, overrides = default, list(words)
    if overrides and "=" not in overrides[0]:
        config = overrides.pop(0)
    for word in overrides:
        if "=" not in word:
            raise UserError(f"command line: {word}: expected key.path=value after the configuration {config}")
    return config, overrides
