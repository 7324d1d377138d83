"""The age of this process: users wait from the moment they launch the command."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["seconds_since_start"]

_STARTTIME = 22  # its field number in /proc/PID/stat (proc(5)), in clock ticks since boot


def seconds_since_start() -> float:
    """Return the seconds since the operating system started this process (Linux)."""
    # The command's name, in parentheses, may contain spaces: split after it.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[_STARTTIME - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
