"""Find dead and hanging ranks: each writes a heartbeat to the launcher's store, which the others read when they are
stuck.

A thread of each rank counts heartbeats there, with the current work of the rank's main thread. A rank whose main thread
makes no progress for the limit looks at all ranks, or reads what another has found (`pulses`): one without new
heartbeats is dead or stopped, and of the others the one that is furthest behind hangs. No clocks are compared, and
nothing is read while all is well.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch.distributed as dist

from iwm_fast.engine.distributed.pulses import Pulse, Pulses, in_time
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError
from iwm_fast.long_work import listening

__all__ = ["Liveness"]

# A launch reads libraries from a shared disk, compiles, and opens data: until the first step, a rank may be silent for
# at least this long.
_START_S = 600.0
_ADVICE = "check that rank's host and the last lines of its log, then resume with --resume auto"


class Liveness:
    """A rank's heartbeat and its view of the others'; does nothing where the rank is alone."""

    def __init__(self, ranks: Ranks, limit_s: float) -> None:
        self._ranks, self._limit_s, self._allowed_s = ranks, limit_s, max(limit_s, _START_S)
        self._beat_s = min(1.0, limit_s / 10)
        self._where, self._moves, self._moved_at = "start", 0, time.monotonic()
        self._beats = 0
        self._over = threading.Event()
        self._looked_at: RuntimeError | None = None
        self._telling = threading.Lock()  # taken, for good, by the thread that reports who is lost
        self._host = ranks.infos[ranks.rank].host if ranks.infos else socket.gethostname()
        self._pulses: Pulses | None = None
        if ranks.store is not None:
            store: Any = ranks.store  # clone is in no stub of torch
            # A connection of its own: a waiting thread blocks the default one.
            self._pulses = Pulses(store.clone(), ranks.rank, ranks.world)
            for work in (self._pulse, self._watch):
                threading.Thread(target=work, name=f"iwm-fast {work.__name__}", daemon=True).start()

    def at(self, where: str) -> None:
        """Note the current work of the main thread. All ranks pass the same places in the same order."""
        self._where, self._moves, self._moved_at = where, self._moves + 1, time.monotonic()

    def note_progress(self) -> None:
        """Note progress within this work: it may be long, and other ranks may wait for it."""
        self._moved_at = time.monotonic()

    def starting(self) -> None:
        """The next step compiles: until `started`, a rank may be silent as long as before the first one."""
        self._allowed_s = max(self._limit_s, _START_S)

    def started(self) -> None:
        """The first step is done: from now on the configured limit holds."""
        self._allowed_s = self._limit_s

    @contextlib.contextmanager
    def within(self, limit_s: float) -> Iterator[None]:
        """Around work that takes no part longer than ``limit_s``: a rank may be silent only that long."""
        before, self._allowed_s = self._allowed_s, limit_s
        yield
        self._allowed_s = before

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the work: where a collective raises because a rank is gone, it is named and the process ends.

        Once more around the loop, where a launcher's SIGTERM is only noted: one that lost the same host sends it at
        the same moment, and the name takes seconds to find.
        """
        try:
            with listening(self.note_progress):
                yield
        except RuntimeError as error:
            if error is not self._looked_at and self._pulses is not None:
                self._look_at(error)
            self._say_last(f"{type(error).__name__}: {error}")
            raise
        except Exception as error:
            self._say_last(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise
        except KeyboardInterrupt:
            self._say_last("interrupted")
            raise
        finally:
            self._over.set()

    def _look_at(self, error: RuntimeError) -> None:
        """Name the rank whose loss raised this and end the process, or return where none is lost."""
        self._looked_at = error
        if not self._telling.acquire(blocking=False):
            threading.Event().wait()  # the watching thread is at it, and ends the process
        lost = self._lost()
        if lost is not None:
            self._tell(lost)

    def _pulse(self) -> None:
        while not self._over.is_set():
            try:
                self._publish()
            except dist.DistError:
                return  # the store's host is gone; the main thread learns of it from its own collective
            self._over.wait(self._beat_s)

    def _watch(self) -> None:
        """In a thread apart from the heartbeat, which must continue while this one reads a stopped store."""
        while not self._over.wait(self._beat_s):
            if time.monotonic() - self._moved_at > self._allowed_s:
                self._end()

    def _publish(self, last: str | None = None) -> None:
        assert self._pulses is not None
        self._beats += 1
        self._pulses.publish(Pulse(self._beats, self._moves, self._where, self._host, os.getpid(), last))

    def _say_last(self, words: str) -> None:
        """Leave the others the reason, while the store exists."""
        if self._pulses is not None:
            self._over.set()
            with contextlib.suppress(dist.DistError, TimeoutError):
                in_time(lambda: self._publish(" ".join(words.split())))

    def _end(self) -> None:
        """End the process: the main thread waits inside a library."""
        if not self._telling.acquire(blocking=False):
            return  # a connection has just failed, and the main thread looks for the reason itself
        lost = self._lost()
        if lost is None:
            lost = f"no rank makes progress, all are in {self._where}"
            self._say_last(lost)
        self._tell(lost)

    def _tell(self, lost: str) -> NoReturn:
        """Print it first, then end: a launcher that lost the same host does not wait for long."""
        print(f"iwm-fast: rank {self._ranks.rank}: {lost}; {_ADVICE}", file=sys.stderr, flush=True)
        self._let_others_look()
        os._exit(1)

    def _let_others_look(self) -> None:
        """Wait: the first rank may hold the store, in which the others look for the lost rank."""
        if self._ranks.first:
            time.sleep(8 * self._beat_s)

    def _lost(self) -> str | None:
        """Return which ranks are dead or hang, in words; None where all have heartbeats and are equally far."""
        assert self._pulses is not None
        try:
            found = self._pulses.look(self._beat_s)
        except (dist.DistError, TimeoutError):
            held = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"{held}, which holds the rendezvous at {host}, is gone or stopped"
        return found.words
