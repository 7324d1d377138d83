"""What a run costs, worked out before it starts."""

from __future__ import annotations

from .flops import StepFlops, step_flops

__all__ = ["StepFlops", "step_flops"]
