"""Signals of a scheduler, a launcher or a person: stop soon, stop now, or continue alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from iwm_fast.parent_process import BORN

__all__ = ["INTERRUPTED", "Abandoned", "StopRequest", "end_with_parent"]

# Exit code after Ctrl-C, as shells give it.
INTERRUPTED = 128 + signal.SIGINT
# Seconds in which a terminal and a launcher may both pass on one Ctrl-C.
_SAME_PRESS_S = 0.25
# Seconds between a Ctrl-C and a forced end, where the main thread waits inside a library.
_GRACE_S = 3.0
_SHOW_CURSOR = "\x1b[?25h"


class Abandoned(Exception):  # noqa: N818  (a circumstance)
    """The work inside `StopRequest.abandonable` was interrupted, because the process is to stop."""


class StopRequest:
    """While entered, what signals mean to a training; on the main thread only, elsewhere it does nothing.

    - Before there is a state to save, Ctrl-C is Python's KeyboardInterrupt, and the other signals end the process.
    - Within ``held``, SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and Ctrl-C set ``asked``, Ctrl-C ``interrupted``
      too; the loop looks at them between steps. A second Ctrl-C is a KeyboardInterrupt again, which says how to resume.

    A KeyboardInterrupt that has not ended the work within seconds, because the main thread waits inside a library,
    ends the process by force. Signals that were ignored from the beginning (nohup, a shell's background job) stay so.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        self._held = False
        self._abandonable = False
        self._first_press: float | None = None
        self._say: Callable[[str], None] = lambda _line: None
        self._ended = "interrupted"
        self._watched: socket.socket | None = None
        self._terminals: list[int] = []
        self._fd_before = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._watched = theirs
            self._fd_before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(ours,), name="iwm-fast signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watched is not None:
            signal.set_wakeup_fd(self._fd_before)
            self._watched.close()  # the watching thread reads the end
            self._watched = None

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None], again: str = "--resume auto") -> Iterator[None]:
        """From here on there is a state to save. ``say`` reports a Ctrl-C to the user; ``again``: how to resume."""
        self._say = say
        self._ended = f"interrupted; steps after the last checkpoint are lost, resume with: {again}"
        before: dict[signal.Signals, Any] = {}
        if self._watched is not None:
            for number in self.SIGNALS:
                if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._note)
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._ended = "interrupted"
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Around work that may be interrupted when the process is to stop: raises `Abandoned` in it at once."""
        self._abandonable = True
        try:
            if self.asked:
                raise Abandoned
            yield
        finally:
            self._abandonable = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_press is None:
                self._first_press = now
            elif now - self._first_press >= _SAME_PRESS_S:
                raise KeyboardInterrupt(self._ended)
            self.interrupted = True
        elif number == signal.SIGHUP:
            _leave(self._terminals)
        self.asked = True
        if self._abandonable:
            self._abandonable = False
            raise Abandoned

    def _watch(self, signals: socket.socket) -> None:
        """In a thread of its own: the main thread sees a signal only when it returns from a library."""
        first: float | None = None
        ends_at: float | None = None
        while True:
            signals.settimeout(None if ends_at is None else max(0.01, ends_at - time.monotonic()))
            try:
                heard = signals.recv(1)
            except TimeoutError:
                self._end()
            if not heard:
                signals.close()
                return
            if heard[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                continue
            now = time.monotonic()
            if first is not None and now - first < _SAME_PRESS_S:
                continue
            if ends_at is not None:  # pressed again while it is ending
                self._end()
            if self._held and first is None:
                self._say("interrupted: stopping with a checkpoint; Ctrl-C again ends at once, without one")
            else:
                ends_at = now + _GRACE_S
            first = now

    def _end(self) -> None:
        """Force the end: the main thread waits inside a library."""
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
        print(f"iwm-fast: {self._ended}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


def _leave(terminals: list[int]) -> None:
    """A closed terminal rejects all output, which would end the training before its checkpoint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)


def end_with_parent(poll_s: float = 0.5) -> None:
    """End this process when its launcher exits: torchrun starts workers in sessions of their own, which outlive it.

    The parent is that of the first import: the launcher may have exited during the imports.
    """
    process, parent = BORN
    if process != os.getpid():  # in a fork, the parent is the forking process
        parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        print("the launcher has exited; this rank stops", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
