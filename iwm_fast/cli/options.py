"""Options that several commands share, and the output of results as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from iwm_fast.cli.completion import overrides
from iwm_fast.errors import UserError
from iwm_fast.outputs import require_result

__all__ = ["CONFIG_HELP", "CacheLimit", "Device", "Json", "Overrides", "Threads", "answer", "byte_count", "key_values"]


def _writable(destination: str | None) -> str | None:
    if destination is not None:
        if destination.endswith((".yaml", ".yml")):
            raise UserError(f"--json: {destination}: a YAML file; name another (a configuration comes before --json)")
        require_result(destination)
    return destination


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_writable,
        help="Write the result as JSON to FILE; without FILE (last, or before an option or KEY=VALUE), print it. "
        "--json=FILE takes any name.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE...", help="Override keys of CONFIG.", autocompletion=overrides),
]
Device = Annotated[str | None, typer.Option("--device", metavar="cpu|cuda", help="Default: a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Torch threads on a CPU. Default: every core.")]
CacheLimit = Annotated[
    float,
    typer.Option(
        "--cache-limit",
        metavar="GB",
        min=0.0,
        help="Most GB that the folder of cached features may hold; features above it are in memory. Nothing is "
        "removed.",
    ),
]
CONFIG_HELP = "A YAML file, or the name of a packaged one such as vit_tiny_p4_32.yaml."


def answer(destination: str | None, kind: str, body: Mapping[str, Any], show: Callable[[], None] | None = None) -> None:
    """Write a result with its schema and environment to a file, to standard output ("-"), or nowhere.

    ``show`` prints it for people, after the file is written; not for "-".
    """
    from iwm_fast.results import give_result

    give_result(destination, kind, body, show)


def byte_count(text: str) -> int:
    """Return the bytes of a size such as 1000000, 512KB, 256MB or 1.5GB; raise UserError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if count < 1:
        raise UserError(f"{text}: not a size; write it as 1000000, 512KB, 256MB or 1.5GB")
    return count


def key_values(words: Sequence[str] | None, option: str, example: str) -> dict[str, Any]:
    """Return the values by key of words KEY=VALUE, read as in a configuration; raise UserError for other words."""
    from iwm_fast.config.yaml_text import parse_value

    found = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {word}: give KEY=VALUE, such as {example}")
        found[key] = parse_value(value, f"{option} {key}")
    return found
