"""Processes that check images before the data thread needs them.

The check is Python (Pillow's parsing of headers) and would hold the interpreter's lock on any thread of this process,
which the training step needs for its launches. A checker reads the file itself and returns a verdict of some bytes. The
data thread alone decides whether a file is bad, its reason and its replacement, in the order of the samples, so results
do not depend on the number or speed of checkers.

A checker is a fresh interpreter, not a fork: it has none of this process's threads, locks or GPU, and does not import
the caller's main module. It ends when its socket closes, so also when this process is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.decode.verdicts import VERDICT, Verdicts, verdict_on
from iwm_fast.data.sources import Source
from iwm_fast.errors import UserError
from iwm_fast.notices import tell_once

__all__ = ["Checkers", "modules_path"]

# Files per request, and requests per checker: few enough that no socket fills, so neither side waits to write.
_PIECE, _HELD = 64, 32
# Sent to all processes of a job; a checker ends with its training only.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Rows = NDArray[np.int64]


def modules_path() -> str:
    """Return a PYTHONPATH with which another interpreter finds the same modules."""
    return os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # noqa: PTH100  ("" is the working one)


class _Checker:
    """One process, and its requests: `sent`, or `queued`, oldest first."""

    def __init__(self, given: bytes) -> None:
        self.connection, theirs = Pipe()
        self.sent: deque[Rows] = deque()
        self.queued: deque[Rows] = deque()
        handle = theirs.fileno()
        # -P: modules come from this process's own path, not the working folder
        command = [sys.executable, "-P", "-m", "iwm_fast.data.checkers", str(handle)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[handle],
            env=os.environ | {"PYTHONPATH": modules_path(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self.connection.send_bytes(given)

    def pump(self) -> None:
        """Send what its socket can take. Raises OSError where the process is gone."""
        while self.queued and len(self.sent) < _HELD:
            self.connection.send_bytes(self.queued[0].tobytes())
            self.sent.append(self.queued.popleft())

    def receive(self) -> tuple[Rows, Verdicts]:
        """Wait for the response to its oldest request. Raises EOFError or OSError where the process is gone."""
        found = np.frombuffer(self.connection.recv_bytes(), VERDICT)
        rows = self.sent.popleft()
        self.pump()
        return rows, found


class Checkers:
    """`processes` that check the samples of a source. `ask` and `answers` are for one thread, `close` for any.

    The end of a process is reported in one line; its requests get no verdict, and the caller checks those files.
    """

    def __init__(self, source: Source, max_pixels: int, processes: int) -> None:
        self._closed = False
        self._by_row: dict[int, _Checker] = {}
        self._turn = 0
        self._all: list[_Checker] = []
        given = pickle.dumps((source, max_pixels), pickle.HIGHEST_PROTOCOL)
        try:
            for _ in range(processes):
                self._all.append(_Checker(given))
        except OSError as error:
            self.close()
            raise UserError(
                f"a process that checks images cannot be started ({error.strerror or error}); set data.checkers=0 to "
                "check them in the training process"
            ) from error
        self._alive = list(self._all)

    def ask(self, rows: Rows) -> None:
        """Check these rows of the source; rows that are being checked are not requested again."""
        new = np.array([row for row in rows.tolist() if row not in self._by_row], np.int64)
        pieces = max(len(self._alive), -(-len(new) // _PIECE))
        for piece in np.array_split(new, pieces) if pieces else []:
            if len(piece) and self._alive:
                self._turn = (self._turn + 1) % len(self._alive)
                checker = self._alive[self._turn]
                checker.queued.append(piece)
                self._by_row |= dict.fromkeys(piece.tolist(), checker)
        for checker in list(self._alive):
            try:
                checker.pump()
            except OSError:
                self._lose(checker)

    def answers(self, rows: Rows) -> list[tuple[Rows, Verdicts]]:
        """Wait for the verdicts on these rows; return them, and others that arrived before."""
        found = []
        for row in rows.tolist():
            while row in self._by_row:
                checker = self._by_row[row]
                try:
                    answer = checker.receive()
                except (EOFError, OSError):
                    self._lose(checker)
                    continue
                for done in answer[0].tolist():
                    self._by_row.pop(done, None)
                found.append(answer)
        return found

    def close(self) -> None:
        """End the processes; a waiting thread gets no verdict."""
        self._closed = True
        for checker in self._all:
            checker.process.kill()
            checker.process.wait()

    def _lose(self, checker: _Checker) -> None:
        self._alive.remove(checker)
        for piece in (*checker.sent, *checker.queued):
            for row in piece.tolist():
                self._by_row.pop(row, None)
        if not self._closed:
            left = f"{len(self._alive)} go on" if self._alive else "the training checks the images itself"
            tell_once(
                f"a process that checks images ended (exit code {checker.process.wait()}; memory that ran out is the "
                f"usual cause of -9): {left}, results stay the same"
            )


def _serve(handle: int) -> None:
    """Run a checker: rows in, verdicts out, until the socket closes."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(handle)
    try:
        source, max_pixels = pickle.loads(connection.recv_bytes())  # noqa: S301  (from the process that started this)
        while True:
            rows = np.frombuffer(connection.recv_bytes(), np.int64)
            found = np.array([_checked(source, row, max_pixels) for row in rows.tolist()], VERDICT)
            connection.send_bytes(found.tobytes())
    except (EOFError, ConnectionError):
        return


def _checked(source: Source, row: int, max_pixels: int) -> tuple[int, int, int, int, int]:
    """A verdict; UNKNOWN where the sample cannot be read, which the data thread finds itself."""
    try:
        raw = source.read(row)
    except (BadSample, UserError):
        return 0, 0, 0, 0, 0
    return verdict_on(raw, max_pixels)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
