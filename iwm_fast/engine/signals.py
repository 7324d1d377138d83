"""What a scheduler or a launcher tells a job: stop soon (SIGTERM, SIGUSR1), or that it is on its own now."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import iwm_fast

__all__ = ["StopRequest", "end_with_parent"]


class StopRequest:
    """While active, SIGTERM and SIGUSR1 set ``asked`` instead of ending the process; the loop looks at it between
    steps.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def end_with_parent(poll_s: float = 0.5) -> None:
    """End this process when its launcher is gone: torchrun starts workers in sessions of their own, which outlive it.

    The parent is the one of this process's first moments: the
    launcher may have gone while it imported, and would not be missed by one who looks only now.
    """
    process, parent = iwm_fast.BORN
    if process != os.getpid():  # a fork: its parent is who forked it
        parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        print("the launcher is gone; this rank ends", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
