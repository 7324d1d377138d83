"""What to change in a configuration, what that gains, and why every other setting is not recommended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iwm_fast.config import Config
from iwm_fast.cost.plan import WORTH, Planner, Refused, Stage, best_of_each

__all__ = ["changes", "duration", "keys", "left_out", "of_gpus"]


def keys(stage: Mapping[str, Any]) -> str:
    """The keys that a setting of the answer stands for, as the command line takes them."""
    return (
        f"zero.stage={stage['stage']} train.activation_checkpointing={str(stage['activation_checkpointing']).lower()} "
        f"train.micro_batch={stage['micro_batch']}"
    )


def changes(planner: Planner, configured: Stage, recommended: Stage) -> str:
    """The keys to replace, one line to paste; empty where the configuration is the recommended setting.

    train.micro_batch is a ceiling: one that already gives the recommended micro-batch is left alone.
    """
    config: Config = planner.config
    words = []
    if config.train.activation_checkpointing != recommended.recompute:
        words.append(f"train.activation_checkpointing={str(recommended.recompute).lower()}")
    if configured.micro_batch != recommended.micro_batch:
        words.append(f"train.micro_batch={recommended.micro_batch}")
    if config.zero.stage != recommended.stage:
        words.append(f"zero.stage={recommended.stage}")
    return " ".join(words)


def left_out(
    variants: Sequence[Stage], refused: Sequence[Refused], chosen: Stage | None, usable: int
) -> list[dict[str, Any]]:
    """{stage, activation_checkpointing, why} of every stage, without and with recomputation, but the chosen one."""
    best = {stage.stage: stage for stage in best_of_each(variants)}
    reasons = [(r.stage, r.recompute, f"refused: {r.why}") for r in refused]
    reasons += [(v.stage, v.recompute, _reason(v, best[v.stage], chosen, usable)) for v in variants if v is not chosen]
    return [
        {"stage": stage, "activation_checkpointing": recompute, "why": why}
        for stage, recompute, why in sorted(reasons, key=lambda r: r[:2])
    ]


def _reason(variant: Stage, best: Stage, chosen: Stage | None, usable: int) -> str:
    """Why a variant is not chosen; best: the better one of its stage."""
    if not variant.fits or chosen is None:
        return (
            f"does not fit: {variant.memory.total / 1e9:.1f} GB at a micro-batch of {variant.micro_batch}, "
            f"{usable / 1e9:.0f} GB are usable"
        )
    if variant is not best:
        ratio = variant.time.total / best.time.total
        return f"{_beside(ratio)} than stage {best.stage} without recomputation, which fits"
    ratio = variant.time.total / chosen.time.total
    if ratio > 1 + WORTH:
        return f"{_beside(ratio)} than the recommended"
    if variant.micro_batch < chosen.micro_batch:
        return f"{_beside(ratio)}, and a micro-batch of {variant.micro_batch} is the largest that fits"
    return f"{_beside(ratio)}; another stage is recommended from {WORTH:.0%} on, because rates and overlap are assumed"


def _beside(ratio: float) -> str:
    """A step's time over another's, in words."""
    if abs(ratio - 1) < 5e-4:
        return "no faster"
    return f"{ratio - 1:.1%} slower" if ratio > 1 else f"{1 - ratio:.1%} faster"


def duration(hours: float) -> str:
    """Hours as a person says them: seconds, minutes, hours, or hours and days."""
    seconds = hours * 3600
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} minutes"
    if hours < 72:
        return f"{hours:.1f} hours"
    return f"{hours:,.0f} hours ({hours / 24:.1f} days)"


def of_gpus(gpu_hours: float) -> str:
    """GPU-hours with two significant digits at least, and never 0."""
    if gpu_hours < 1e-3:
        return "less than 0.001 GPU-hours"
    return f"{gpu_hours:.2g} GPU-hours" if gpu_hours < 10 else f"{gpu_hours:,.0f} GPU-hours"
