"""What is said under a table of results: which images they are of, and what was not measured, left out or reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.eval.reduced import reduced_lines
from iwm_fast.eval.representation.view_pairs import left_out_line
from iwm_fast.eval.unusable import left_out_lines
from iwm_fast.file_names import printable

__all__ = ["data_lines", "result_lines"]


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """A line each, from the results of ``evaluate_run`` or of one task of ``finetune_run``."""
    lines = [*data_lines(results)]
    lines += [printable(f"{measure} not run: {why}") for measure, why in results.get("not_run", {}).items()]
    if results.get("equivariance_left_out"):
        lines.append(f"r2 left out: {left_out_line(results['equivariance_left_out'])}")
    return lines


def data_lines(results: Mapping[str, Any]) -> list[str]:
    """Which images are learned from and tested on, what of them was left out, which settings they were too few for."""
    lines = [f"data: {results['splits']['said']}"] if "splits" in results else []
    return lines + left_out_lines(results.get("left_out", {})) + reduced_lines(results.get("reduced", {}))
