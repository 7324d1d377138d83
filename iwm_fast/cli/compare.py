"""`iwm-fast compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from iwm_fast.cli.options import Json, answer

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of pretrain, export or finetune --out.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Also write DIR/index.html, an offline page with curves."),
    ] = None,
    axis: Annotated[
        Literal["steps", "images"] | None,
        typer.Option("--axis", help="X axis of the curves. Default: images if the runs' batches differ."),
    ] = None,
    json: Json = None,
) -> None:
    """Compare runs: settings that differ, curves, and metrics with their intervals. Nothing is evaluated or changed.

    Each is compared with the first. Evaluate them with one --data first. For results of iwm-fast bench, see iwm-fast
    bench compare.
    """
    from iwm_fast.console import print_lines, print_table
    from iwm_fast.eval.compare.compare import compare as compare_runs
    from iwm_fast.eval.compare.compare import write_page

    found = compare_runs(runs, axis)
    page = write_page(found, out) if out is not None else None

    def show() -> None:
        for title, head, rows in found.tables():
            print_table(title, head, rows)
        print_lines(f"note: {line}" for line in found.notes())

    answer(json, "compare", {**found.document(), "page": None if page is None else str(page)}, show)
    if page is not None and json != "-":
        print(f"page: {page}")
