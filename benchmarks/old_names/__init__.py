"""Programs under the names that they had up to 0.1.0; they go with the release after it."""

from __future__ import annotations

import runpy
import sys

__all__ = ["run_renamed"]


def run_renamed(old: str, new: str) -> None:
    """Run the program `benchmarks.NEW`, and say its name once on standard error."""
    print(f"benchmarks.{old} is benchmarks.{new} now; the old name goes with the next release", file=sys.stderr)
    runpy.run_module(f"iwm_fast.benchmarks.{new}", run_name="__main__", alter_sys=True)
