"""What every program of the package does around its work: streams, one line for an error, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from iwm_fast.errors import UserError, because
from iwm_fast.streams import open_streams, output_failure, shown

__all__ = ["one_line", "run_program"]


def run_program(
    name: str,
    work: Callable[[], object],
    *,
    debug: bool = False,
    describe: Callable[[Exception], str] | None = None,
    mendable: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Run ``work`` and return the exit code: its own where it is a number, else 0; 2 and one line for an error that the
    user can mend; 130 for an interruption.

    ``debug``: such an error is raised instead. ``describe``: its line; "" for one that has been said already.
    """
    open_streams()
    try:
        code = work()
    except KeyboardInterrupt:
        return 130
    except mendable as error:
        if debug:
            raise
        _say(name, (describe or one_line)(error))
        code = 2
    failure = output_failure()
    if failure is not None:
        _say(name, one_line(failure))
        return 2
    return code if isinstance(code, int) else 0


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{_name(error.filename)}: {because(error)}"
    else:
        text = str(error)
    return " ".join(text.split())


def _name(file: object) -> str:
    return shown(file.decode(errors="surrogateescape") if isinstance(file, bytes) else str(file))


def _say(name: str, line: str) -> None:
    if line:
        print(f"{name}: {line}", file=sys.stderr, flush=True)
