"""The command line's arguments before the parser sees them: what launchers add, and options that may stand anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from iwm_fast.errors import UserError

__all__ = ["config_and_overrides", "prepare"]


def prepare(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """(arguments for the parser, whether ``--debug`` was among them).

    - ``--debug`` may stand before the command or after it.
    - ``--local_rank=N`` (deepspeed's launcher puts it first) is dropped: the engine reads LOCAL_RANK, which is set too.
    - ``--json`` with no file after it becomes ``--json -``, standard output. It is bare at the end of the line and
      before another option; elsewhere what follows is its file.
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
        elif word == "--json" and (not rest or (rest[0].startswith("-") and rest[0] != "-")):
            kept += [word, "-"]
        else:
            kept.append(word)
    return kept, debug


def config_and_overrides(words: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Tell an optional CONFIG from the ``key=value`` words after it.

    Raises UserError for a second word that is no override.
    """
    config, overrides = default, list(words)
    if overrides and "=" not in overrides[0]:
        config = overrides.pop(0)
    for word in overrides:
        if "=" not in word:
            raise UserError(f"command line: {word}: expected key.path=value after the configuration {config}")
    return config, overrides
