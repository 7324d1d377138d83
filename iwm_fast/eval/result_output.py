"""An evaluation's answer on its way out: asked first whether it has a place, and given before anything is drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iwm_fast.errors import UserError
from iwm_fast.eval.measurements import FOLDER
from iwm_fast.outputs import unwritable

__all__ = ["given", "report_place"]


def report_place(run: Path, *, needed: bool) -> Path | None:
    """Where a run's page is written. UserError where it cannot be and is ``needed``; else that is said, and None."""
    folder = run / "report"
    for place in (folder, run / FOLDER):
        why = unwritable(place)
        if why is not None:
            if needed:
                raise UserError(f"{place}: cannot be written: {why}; name --json FILE for the figures without a page")
            print(f"{place}: cannot be written: {why}; figures only, no page", file=sys.stderr, flush=True)
            return None
    return folder / "index.html"


@contextmanager
def given(give: Callable[[dict[str, Any]], None] | None, answer: dict[str, Any]) -> Iterator[None]:
    """Give the answer, then run the block; what ``give`` could not write is raised after it."""
    failure = None
    if give is not None:
        try:
            give(answer)
        except UserError as error:
            failure = error
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}: the figures are given, the page is not written") from error
    if failure is not None:
        raise failure
