"""Output of an evaluation: checked before the work, and written before anything is drawn."""

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
    """Return where a run's page is written. If that fails: raise UserError if ``needed``, else say so, return None."""
    folder = run / "report"
    for place in (folder, run / FOLDER):
        why = unwritable(place)
        if why is not None:
            if needed:
                raise UserError(
                    f"{place}: cannot be written: {why}; give --json FILE to get the results without a page"
                )
            print(f"{place}: cannot be written: {why}; results only, no page", file=sys.stderr, flush=True)
            return None
    return folder / "index.html"


@contextmanager
def given(give: Callable[[dict[str, Any]], None] | None, answer: dict[str, Any]) -> Iterator[None]:
    """Write the answer, then run the block; an error of ``give`` is raised after it."""
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
        raise UserError(f"{where}{error.strerror or error}: the results are written, the page is not") from error
    if failure is not None:
        raise failure
