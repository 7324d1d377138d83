"""What commands print: tables on standard output, progress on standard error, both plain where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from iwm_fast.file_names import printable

__all__ = ["Count", "counting", "part_of", "print_table"]

Count = Callable[[str, int, int | None], None]  # what is being done, how much of it is done, of how much

# Without a terminal a line appears at most this often for one piece of work.
_PLAIN_EVERY_S = 10.0


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts to standard output: drawn on a terminal, one unwrapped line a row elsewhere."""
    kept = [tuple(map(printable, row)) for row in rows]
    if sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in kept:
            table.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(table)
        return
    lines = [tuple(columns), *kept] if any(columns) else kept
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))] if lines else []
    print(title)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def part_of(progress: Count | None, what: str) -> Callable[[int, int], None] | None:
    """What gets (done, of how many) of one piece of the work, where somebody follows it."""
    return None if progress is None else partial(progress, what)


@contextmanager
def counting() -> Iterator[Count]:
    """A callback for work that is counted: a bar a piece of work on a terminal, a line now and then elsewhere."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def count(text: str, done: int, total: int | None) -> None:
            name = printable(text)
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield count


def _plain_lines() -> Count:
    last: dict[str, float] = {}

    def count(text: str, done: int, total: int | None) -> None:
        name = printable(text)
        now = time.monotonic()
        if done == total or now - last.setdefault(name, now) >= _PLAIN_EVERY_S:
            last[name] = now
            print(f"{name}: {done}" + ("" if total is None else f" of {total}"), file=sys.stderr, flush=True)

    return count
