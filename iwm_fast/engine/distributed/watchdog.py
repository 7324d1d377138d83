"""Find dead and hanging ranks: each writes a heartbeat to the launcher's store, which the others read when they are
stuck.

A thread of each rank counts heartbeats there, with the current work of the rank's main thread. A rank whose main thread
makes no progress for the limit looks at all ranks: one without new heartbeats is dead or stopped, and of the others the
one that is furthest behind hangs. No clocks are compared, and nothing is read while all is well.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch.distributed as dist

from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError

__all__ = ["Liveness"]

# A launch reads libraries from a shared disk, compiles, and opens data: until the first step, a rank may be silent for
# at least this long.
_START_S = 600.0
# A store that takes longer to respond is stopped. Short: a launcher that is cut off ends its ranks after half a minute.
_ANSWER_S = 5.0
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
        self._store: Any = None
        if ranks.world > 1:
            # A connection of its own: a waiting thread blocks the default one.
            default: Any = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (has no public name)
            self._store = dist.PrefixStore("iwm_fast/pulse", default.clone())
            for work in (self._pulse, self._watch):
                threading.Thread(target=work, name=f"iwm-fast {work.__name__}", daemon=True).start()

    def at(self, where: str) -> None:
        """Note the current work of the main thread. All ranks pass the same places in the same order."""
        self._where, self._moves, self._moved_at = where, self._moves + 1, time.monotonic()

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
            yield
        except RuntimeError as error:
            if error is not self._looked_at and self._store is not None:
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
        self._beats += 1
        pulse = {
            "beats": self._beats,
            "moves": self._moves,
            "where": self._where,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "last": last,
        }
        self._store.set(str(self._ranks.rank), json.dumps(pulse))

    def _say_last(self, words: str) -> None:
        """Leave the others the reason, while the store exists."""
        if self._store is not None:
            self._over.set()
            with contextlib.suppress(dist.DistError, TimeoutError):
                _answered(lambda: self._publish(" ".join(words.split())))

    def _end(self) -> None:
        """End the process: the main thread waits inside a library."""
        if not self._telling.acquire(blocking=False):
            return  # a connection has just failed, and the main thread looks for the reason itself
        self._tell(self._lost() or f"no rank makes progress, all are in {self._where}")

    def _tell(self, lost: str) -> NoReturn:
        """Print it first, then end: a launcher that lost the same host does not wait for long."""
        print(f"iwm-fast: rank {self._ranks.rank}: {lost}; {_ADVICE}", file=sys.stderr, flush=True)
        self._say_last(lost)
        self._let_others_look()
        os._exit(1)

    def _let_others_look(self) -> None:
        """Wait: the first rank may hold the store, in which the others look for the lost rank."""
        if self._ranks.first:
            time.sleep(8 * self._beat_s)

    def _lost(self) -> str | None:
        """Return which rank is dead or hangs, in words; None where all have heartbeats and are equally far."""
        try:
            before = _answered(self._read)
            time.sleep(4 * self._beat_s)
            after = _answered(self._read)
        except (dist.DistError, TimeoutError):
            held = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"{held}, which holds the rendezvous at {host}, is gone or stopped"
        others = [r for r in range(self._ranks.world) if r != self._ranks.rank]
        silent = [r for r in others if after[r] is None or _beats(after[r]) == _beats(before[r])]
        last = {r: pulse["last"] for r in silent if (pulse := after[r]) is not None and pulse["last"]}
        if last:
            return "; ".join(f"{_name(r, after[r])} has ended: {words}" for r, words in last.items())
        if silent:
            return "; ".join(f"{_name(r, after[r])} is gone or stopped" for r in silent)
        moves = {r: p["moves"] for r, p in after.items() if p is not None} | {self._ranks.rank: self._moves}
        least = min(moves.values())
        if least == max(moves.values()):
            return None
        return "; ".join(f"{_name(r, after[r])} hangs" for r, n in moves.items() if n == least)

    def _read(self) -> dict[int, dict[str, Any] | None]:
        found: dict[int, dict[str, Any] | None] = {}
        for rank in range(self._ranks.world):
            key = str(rank)
            found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else None
        return found


def _answered(call: Callable[[], Any]) -> Any:
    """Return the result of a call on the launcher's store; TimeoutError where it does not respond."""
    found: list[Any] = []
    failed: list[dist.DistError] = []

    def ask() -> None:
        try:
            found.append(call())
        except dist.DistError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"the store has not answered within {_ANSWER_S:g} s")
    return found[0]


def _beats(pulse: dict[str, Any] | None) -> int:
    return pulse["beats"] if pulse else 0


def _name(rank: int, pulse: dict[str, Any] | None) -> str:
    if pulse is None:
        return f"rank {rank}"
    return f"rank {rank} (host {pulse['host']}, pid {pulse['pid']}, last seen in {pulse['where']})"
