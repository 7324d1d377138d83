"""Wait for data that disappear for a while (a mount that drops, a server that restarts)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from iwm_fast.data.sources import DataGone
from iwm_fast.errors import UserError

__all__ = ["read_present"]

_FIRST_S, _LONGEST_S = 0.1, 5.0


def read_present(read: Callable[[], bytes], wait_s: float, closed: threading.Event) -> bytes:
    """Call `read` for up to `wait_s` seconds until it does not raise DataGone; return its result.

    Raises UserError where the data have not come back by then, or when `closed` is set before.
    """
    begin, pause = time.monotonic(), _FIRST_S
    while True:
        try:
            return read()
        except DataGone as gone:
            waited = time.monotonic() - begin
            if wait_s and (waited >= wait_s or closed.is_set()):
                raise UserError(
                    f"{gone.what} and has not come back within {wait_s:g} s; bring the data back, and start again: a "
                    "training resumes with --resume auto, and waits longer with a larger data.wait_s"
                ) from gone
            if not wait_s:
                raise
            if pause == _FIRST_S:
                print(f"{gone.what}; waiting up to {wait_s:g} s for it", file=sys.stderr, flush=True)
        closed.wait(min(pause, wait_s - waited))
        pause = min(2 * pause, _LONGEST_S)
