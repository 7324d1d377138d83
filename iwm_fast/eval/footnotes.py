"""Notes under a table of results: which images they are of, and what was left out or reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iwm_fast.eval.reduced import reduced_lines
from iwm_fast.eval.unusable import left_out_lines

__all__ = ["by_default_lines", "data_lines"]


def data_lines(results: Mapping[str, Any]) -> list[str]:
    """Return lines on which images were trained and tested on, what was left out, and which settings were reduced."""
    lines = [f"data: {results['splits']['said']}"] if "splits" in results else []
    return lines + left_out_lines(results.get("left_out", {})) + reduced_lines(results.get("reduced", {}))


def by_default_lines(left_out: Sequence[str]) -> list[str]:
    """Return a line on the evaluations that run only if they are named."""
    if not left_out:
        return []
    return [f"not measured by default: {', '.join(left_out)}; name them in --what, or measure all with --full"]
