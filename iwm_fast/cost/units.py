"""Hours and GPU-hours in units that show them."""

from __future__ import annotations

__all__ = ["duration", "of_gpus"]


def duration(hours: float) -> str:
    """Return hours as seconds, minutes, hours, hours and days, or years."""
    seconds = hours * 3600
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    if hours < 72:
        return f"{hours:.1f} hours"
    if hours > 5 * 24 * 365.25:
        return f"{hours / 24 / 365.25:,.0f} years"
    return f"{hours:,.0f} hours ({hours / 24:.1f} days)"


def of_gpus(gpu_hours: float) -> str:
    """Return GPU-hours with at least two significant digits, and never 0."""
    if gpu_hours < 1e-3:
        return "less than 0.001 GPU-hours"
    return f"{gpu_hours:.2g} GPU-hours" if gpu_hours < 10 else f"{gpu_hours:,.0f} GPU-hours"
