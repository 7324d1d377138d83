"""Print tables to standard output and progress to standard error, as plain text without a terminal."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from iwm_fast.file_names import printable

__all__ = ["PIPED_WIDTH", "Count", "counting", "part_of", "print_lines", "print_table"]

Count = Callable[[str, int, int | None], None]  # (what is being done, units done, units in all)

# Without a terminal: seconds between lines of one task.
_PLAIN_EVERY_S = 10.0
PIPED_WIDTH = 100


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts to standard output, as wide as the terminal, or `PIPED_WIDTH` elsewhere.

    Wider cells are wrapped at spaces; a word (such as a path) is never broken.
    """
    kept = [tuple(map(printable, row)) for row in rows]
    lines = [tuple(columns), *kept] if any(columns) else kept
    terminal = sys.stdout.isatty()
    texts = _laid_out(lines, _width())
    if not terminal:
        print("\n".join([title, *texts]))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, "bold italic"))
    header = len(_cells(lines[0], _column_widths(lines, _width())[0])) if any(columns) else 0
    for number, text in enumerate(texts):
        console.print(Text(text, "bold" if number < header else ""))


def print_lines(lines: Iterable[str], first: str = "", further: str = "    ") -> None:
    """Print sentences to standard output, each wrapped at the width of a table. `first`, `further`: indents of a
    sentence's first line and of its other lines.
    """
    for line in lines:
        print("\n".join(_wrapped(printable(line), _width(), first, further)))


def _width() -> int:
    return Console().width if sys.stdout.isatty() else PIPED_WIDTH


def _laid_out(lines: Sequence[Sequence[str]], width: int) -> list[str]:
    if not lines:
        return []
    widths, gap = _column_widths(lines, width)
    found = []
    for line in lines:
        for parts in _cells(line, widths):
            padded = (part + " " * (size - cell_len(part)) for part, size in zip(parts, widths, strict=True))
            found.append(gap.join(padded).rstrip())
    return found


def _column_widths(lines: Sequence[Sequence[str]], width: int) -> tuple[list[int], str]:
    """Return (width of each column, separator): the widest columns are narrowed first, none below its longest word."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    least = [max(cell_len(word) for cell in column for word in cell.split(" ")) for column in columns]
    between = len(least) - 1
    gap = " " if sum(least) + between <= width < sum(least) + 2 * between else "  "
    room = width - len(gap) * between
    while sum(widths) > room:
        wider = [(size, column) for column, size in enumerate(widths) if size > least[column]]
        if not wider:
            break
        widths[max(wider)[1]] -= 1
    return widths, gap


def _cells(line: Sequence[str], widths: Sequence[int]) -> list[tuple[str, ...]]:
    """Wrap the cells of a row; return its lines."""
    parts = [_wrapped(cell, size) for cell, size in zip(line, widths, strict=True)]
    return list(zip_longest(*parts, fillvalue=""))


def _wrapped(text: str, width: int, first: str = "", further: str = "") -> list[str]:
    if cell_len(first + text) <= width:
        return [first + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def part_of(progress: Count | None, what: str) -> Callable[[int, int], None] | None:
    """Return a callback (done, total) for one task, or None without `progress`."""
    return None if progress is None else partial(progress, what)


@contextmanager
def counting() -> Iterator[Count]:
    """Yield a progress callback: a bar per task on a terminal, occasional lines elsewhere, with the time left."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _plain_lines()
        return
    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def count(text: str, done: int, total: int | None) -> None:
            name = printable(text)
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield count


def _plain_lines() -> Count:
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, float] = {}

    def count(text: str, done: int, total: int | None) -> None:
        name = printable(text)
        now = time.monotonic()
        began, had = first.setdefault(name, (now, done))
        if done == total or now - last.setdefault(name, now) >= _PLAIN_EVERY_S:
            last[name] = now
            of = "" if total is None else f" of {total}"
            if total is not None and had < done < total:
                seconds = (now - began) / (done - had) * (total - done)
                of += f", {timedelta(seconds=round(seconds))} left"
            print(f"{name}: {done}{of}", file=sys.stderr, flush=True)

    return count
