"""Notices on standard error that a job prints once, however many ranks and readers meet their cause."""

from __future__ import annotations

import os
import sys
import threading

__all__ = ["tell_once"]

_told: set[str] = set()
_telling = threading.Lock()


def tell_once(line: str) -> None:
    """Print a line to standard error, once per process and on the first rank only."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    with _telling:
        if rank != "0" or line in _told:
            return
        _told.add(line)
    print(line, file=sys.stderr, flush=True)
