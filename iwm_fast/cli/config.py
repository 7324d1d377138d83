"""`iwm-fast config`: print a resolved configuration, or list every key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from iwm_fast.cli.completion import config_files
from iwm_fast.cli.options import CONFIG_HELP, Json, Overrides, answer
from iwm_fast.errors import UserError

if TYPE_CHECKING:
    from iwm_fast.config.schema_table import Row

__all__ = ["show_config"]


def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, autocompletion=config_files)
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="List every key: type, default, allowed values, meaning.")
    ] = False,
    json: Json = None,
) -> None:
    """Print the resolved configuration: every key with its value."""
    from dataclasses import asdict

    from iwm_fast.config import dump_config, load_config
    from iwm_fast.config.batch import known_in_steps
    from iwm_fast.config.load import find_config, packaged_names
    from iwm_fast.config.schema_table import rows

    if schema:
        answer(json, "config-schema", {"keys": [asdict(row) for row in rows()]}, lambda: _show_schema(rows()))
        return
    if config is None:
        raise UserError(
            f"config: CONFIG is missing; give a YAML file, or one of {', '.join(packaged_names())}, or --schema"
        )
    loaded = load_config(find_config(config), overrides or [])
    in_steps = known_in_steps(loaded)
    if json is None:
        print(dump_config(loaded), end="")
        for line in in_steps:
            print(f"# {line}")
    answer(json, "config", {"config": loaded.model_dump(mode="json"), "in_steps": in_steps})


def _show_schema(rows: Sequence[Row]) -> None:
    """Print at least two lines per key: its allowed values, and its meaning below."""
    from iwm_fast.console import print_lines

    print_lines(["KEY  default  allowed"])
    print_lines(["meaning"], "    ")
    for row in rows:
        print_lines([f"{row.key}  {row.default}  {row.allowed}"], further=" " * 8)
        print_lines([row.description], "    ")
