"""Work on spans of a long list in processes beside this one, answers in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from iwm_fast.errors import UserError

__all__ = ["in_order"]

# Spans that each process has been given at a time: the next one is there before an answer is taken.
_AHEAD = 2


def in_order(work: Callable[[Any, Any], Any], given: Any, spans: Iterable[Any], processes: int) -> Iterator[Any]:
    """work(given, span) for each span, in their order; errors are raised here. Takes a few spans ahead, not all.

    With one process it is done here. work is a module's function, given is picklable and sent once. A process that dies
    is a UserError, and when this process dies the others end too: what they wait for comes through a pipe of which only
    this process has the other end.
    """
    if processes < 2:
        for span in spans:
            yield work(given, span)
        return
    context = multiprocessing.get_context("spawn")  # no thread and no lock of this process comes along
    helpers = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            ours.send(given)
            helpers.append((process, ours))
        yield from _collect([connection for _, connection in helpers], spans)
    finally:
        for process, connection in helpers:
            connection.close()
            process.terminate()
            process.join()


def _collect(connections: list[Connection], spans: Iterable[Any]) -> Iterator[Any]:
    """Spans go to the processes in turn, so the answers come in turn as well."""
    waiting: deque[Connection] = deque()
    for number, span in enumerate(spans):
        if len(waiting) == _AHEAD * len(connections):
            yield _answer(waiting.popleft())
        connection = connections[number % len(connections)]
        connection.send(span)
        waiting.append(connection)
    while waiting:
        yield _answer(waiting.popleft())


def _answer(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "a worker process died, usually because memory ran out; run the command again, it resumes"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, work: Callable[[Any, Any], Any]) -> None:
    """The other process: spans in, answers out, until nobody sends any more."""
    try:
        given = connection.recv()
        while True:
            span = connection.recv()
            try:
                connection.send(work(given, span))
            except (UserError, OSError, ValueError) as error:
                connection.send(error)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
