"""Options that several commands share, and how a command gives its answer to a program."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from iwm_fast.errors import UserError

__all__ = ["CONFIG_HELP", "Json", "Overrides", "answer", "byte_count"]

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the answer as JSON to FILE; without FILE, print it.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE...", help="Settings that replace those of CONFIG.")
]
CONFIG_HELP = "A YAML file, or the name of a packaged one such as vit_tiny_p4_32.yaml."


def answer(destination: str | None, kind: str, body: dict[str, Any]) -> None:
    """Write the body of a result with its schema and environment to a file, to standard output ("-"), or nowhere."""
    if destination is not None:
        from iwm_fast.results import write_result

        write_result(destination, kind, body)


def byte_count(text: str) -> int:
    """Bytes of a size such as 1000000, 512KB, 256MB or 1.5GB; UserError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if count < 1:
        raise UserError(f"{text}: not a size; write it as 1000000, 512KB, 256MB or 1.5GB")
    return count
