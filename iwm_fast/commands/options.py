"""Options that several commands share, and how a command gives its answer to a program."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["CONFIG_HELP", "Json", "Overrides", "answer"]

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
