"""Why a plan does not recommend each of the other settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iwm_fast.cost.plan import WORTH, Cluster, Planner, Stage

__all__ = ["left_out"]


def left_out(
    planner: Planner, variants: Sequence[Stage], chosen: Stage | None, cluster: Cluster
) -> list[dict[str, Any]]:
    """Return {stage, activation_checkpointing, hpz_partition_size, why} of every setting except the recommended one."""
    best = {stage.stage: stage for stage in planner.best(variants)}
    reasons = [(r.stage, r.recompute, 1, f"refused: {r.why}") for r in planner.settings[1]]
    for v in variants:
        if v is not chosen:
            why = _reason(v, best[v.stage], chosen, cluster.usable)
            plain = next(p for p in variants if (p.stage, p.recompute, p.hpz) == (v.stage, v.recompute, 1))
            reasons.append((v.stage, v.recompute, v.hpz, why + _of_copies(v, plain, cluster)))
    return [
        {"stage": stage, "activation_checkpointing": recompute, "hpz_partition_size": hpz, "why": why}
        for stage, recompute, hpz, why in sorted(reasons, key=lambda r: r[:3])
    ]


def _of_copies(variant: Stage, plain: Stage, cluster: Cluster) -> str:
    """What a copy of the parameters within each host gains and costs, beside the same setting without."""
    if variant.hpz == 1 or not variant.fits:
        return ""
    cost = f"the copy takes {variant.memory.host_copy / 1e9:.2g} GB"
    if not any(c.ranks for c in variant.collectives):
        return f": a step gathers each parameter once, so that none is gathered within a host; {cost}"
    network = [sum(cluster.fabric.transfer(c).network_bytes for c in s.collectives) for s in (plain, variant)]
    exposed = (plain.time.exposed - variant.time.exposed) * 1e3
    waits = (variant.time.forward + variant.time.backward - plain.time.forward - plain.time.backward) * 1e3
    return (
        f": {network[0] / 1e9:.2g} → {network[1] / 1e9:.2g} GB over the network per step and GPU, which saves "
        f"{exposed:.1f} ms not hidden; launches that wait for the copies cost {waits:.1f} ms; {cost}"
    )


def _reason(variant: Stage, best: Stage, chosen: Stage | None, usable: int) -> str:
    """Why a variant is not chosen; best: the better one of its stage."""
    if not variant.fits or chosen is None:
        return (
            f"does not fit: {variant.memory.total / 1e9:.1f} GB at a micro-batch of {variant.micro_batch}, "
            f"{usable / 1e9:.0f} GB are usable"
        )
    if variant is not best:
        ratio = variant.time.total / best.time.total
        copies = f" with copies within hosts of {best.hpz}" if best.hpz > 1 else ""
        if variant.hpz != best.hpz and variant.recompute == best.recompute:
            return f"{_beside(ratio)} than stage {best.stage}{copies or ' without copies within hosts'}"
        recomputed = "with" if best.recompute else "without"
        return f"{_beside(ratio)} than stage {best.stage}{copies} {recomputed} recomputation, which fits"
    ratio = variant.time.total / chosen.time.total
    if ratio > 1 + WORTH:
        return f"{_beside(ratio)} than the recommended setting"
    if variant.micro_batch < chosen.micro_batch:
        return f"{_beside(ratio)}, and a micro-batch of {variant.micro_batch} is the largest that fits"
    return f"{_beside(ratio)}; another stage is recommended from {WORTH:.0%} on, because rates and overlap are assumed"


def _beside(ratio: float) -> str:
    """Return the ratio of two step times in words."""
    if abs(ratio - 1) < 5e-4:
        return "no faster"
    return f"{ratio - 1:.1%} slower" if ratio > 1 else f"{1 - ratio:.1%} faster"
