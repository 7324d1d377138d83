"""The frame of every program of the package: streams, one line per error, and the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from iwm_fast.errors import Interrupted, UserError, because
from iwm_fast.file_names import valid_unicode
from iwm_fast.streams import open_streams, output_failure

__all__ = ["CtrlC", "one_line", "run_program"]

_INTERRUPTED = 128 + signal.SIGINT
# After Ctrl-C: seconds for threads of libraries to end.
_GRACE_S = 2.0


class CtrlC(Exception):  # noqa: N818  (a circumstance)
    """A KeyboardInterrupt (its cause) on its way through a parser that would swallow it."""


def run_program(
    name: str,
    work: Callable[[], object],
    *,
    debug: bool = False,
    describe: Callable[[Exception], str] | None = None,
    mendable: tuple[type[Exception], ...] = (UserError, OSError),
    ends_process: bool = False,
) -> int:
    """Run ``work`` and return the exit code: its own number, else 0; 2 after an error that the user can fix; 130 after
    Ctrl-C. The last two print one line.

    ``debug``: raise such an error instead. ``describe``: returns its line, "" where it has been printed.
    ``ends_process``: the process ends with the program, soon after Ctrl-C whatever threads of libraries do.
    """
    open_streams()
    if ends_process:
        _end_in_imports(name)
    try:
        _require_current_folder()
        code = work()
    except (KeyboardInterrupt, CtrlC) as error:
        pressed = error.__cause__ if isinstance(error, CtrlC) else error
        if not isinstance(pressed, Interrupted):
            _say(name, str(pressed or "") or "interrupted")
        if ends_process:
            _end_soon()
        return _INTERRUPTED
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


def _require_current_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(
            f"the current folder is gone or may not be read ({error.strerror}): cd to another, then start again"
        ) from error


def _end_in_imports(name: str) -> None:
    """Exit at once on Ctrl-C during imports: libraries swallow its exception there, continue half imported, and fail
    elsewhere or never.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def heard(number: int, frame: FrameType | None) -> None:
        below = frame
        while below is not None:
            if below.f_code.co_filename.startswith("<frozen importlib"):
                with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, or interrupted while it writes
                    _say(name, "interrupted")
                    sys.stdout.flush()
                os._exit(_INTERRUPTED)
            below = below.f_back
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, heard)


def _end_soon() -> None:
    """End the process while threads of libraries still run; at once when Ctrl-C is pressed again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end() -> None:
        time.sleep(_GRACE_S)
        os._exit(_INTERRUPTED)

    threading.Thread(target=end, daemon=True).start()


def one_line(error: Exception) -> str:
    """Return an error's text without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{_name(error.filename)}: {because(error)}"
    else:
        text = str(error)
    return " ".join(text.split())


def _name(file: object) -> str:
    return valid_unicode(file.decode(errors="surrogateescape") if isinstance(file, bytes) else str(file))


def _say(name: str, line: str) -> None:
    if line:
        print(f"{name}: {line}", file=sys.stderr, flush=True)
