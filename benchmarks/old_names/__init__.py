"""Programs under their names up to 0.1.0; removed in the release after it."""

from __future__ import annotations

import runpy
import sys

__all__ = ["run_renamed"]


def run_renamed(old: str, new: str) -> None:
    """Run the program `benchmarks.NEW`, and print its new name once on standard error."""
    print(f"benchmarks.{old} is now benchmarks.{new}; the next release removes the old name", file=sys.stderr)
    runpy.run_module(f"iwm_fast.benchmarks.{new}", run_name="__main__", alter_sys=True)
