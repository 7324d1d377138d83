"""Failures in the result of `iwm-fast plan`: numbers, sentences, assumptions, and the table by GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from iwm_fast.config.batch import in_steps
from iwm_fast.cost.failures import (
    DRAIN_S,
    GPU_HOURS,
    GPU_HOURS_SOURCE,
    HOST_COPY,
    RESTART_S,
    STORAGE,
    Checkpoint,
    Failures,
    Interval,
    expected_loss,
)
from iwm_fast.cost.plan import Cluster, Planner, Stage
from iwm_fast.cost.scaling import Point, efficiency
from iwm_fast.cost.units import duration

__all__ = ["SCALING_COLUMNS", "failure_assumptions", "failure_record", "failure_sentences", "scaling_rows"]

SCALING_COLUMNS = (
    "GPUs", "global batch", "ZeRO", "images/s", "of perfect", "run", "failures", "checkpoint every", "time lost"
)  # fmt: skip


def failure_record(
    planner: Planner, cluster: Cluster, stage: Stage | None, steps: int, images: int, failures: Failures
) -> dict[str, Any]:
    """Return what `failures` do to the run at the recommended setting, as JSON values; ``plan`` is None where nothing
    fits.
    """
    found: dict[str, Any] = {**asdict(failures), "plan": None, "configured": None}
    if stage is None:
        return found
    step_s, layout = stage.time.total, planner.layout
    checkpoint = Checkpoint.of(layout.trained_size, layout.target_size, cluster.world, failures)
    plan = Interval.of(checkpoint, failures, cluster.world, steps, step_s)
    every = min(steps, in_steps(planner.config, images).checkpoint.every_steps)
    loss = expected_loss(every * step_s, checkpoint, plan.mean_s)
    now = {"every_steps": every, "interval_s": every * step_s, "loss": asdict(loss), "lost_share": loss.total}
    change = f"checkpoint.every_steps={plan.every_steps}"
    if planner.config.checkpoint.every_epochs is not None:  # of both keys only one may be set
        change += " checkpoint.every_epochs=null"
    return found | {"plan": plan.record(), "configured": now, "change": change}


def failure_sentences(record: Mapping[str, Any]) -> list[str]:
    """Return how many failures to expect, the interval to paste, what it loses, and what the configured one loses."""
    failures = record["failures"]
    plan, now = failures["plan"], failures["configured"]
    if plan is None:
        return []
    gpus = record["cluster"]["nodes"] * record["cluster"]["gpus_per_node"]
    once = f"one in {duration(plan['mean_s'] / 3600)} on {gpus:,} GPUs"
    if plan["expected"] is None:
        restart = duration(plan["checkpoint"]["restart_s"] / 3600)
        return [f"failures: {once}, and a restart takes {restart}: the run would hardly ever end; use fewer GPUs"]
    whole = plan["every_steps"] >= record["steps"]
    said = [
        (
            f"failures: {_count(plan['expected'])} expected in the run ({once}); {failures['change']} (every "
            f"{duration(plan['interval_s'] / 3600)}{': the last one is enough' if whole else ''}) loses {_lost(plan)}"
        ),
    ]
    if now["every_steps"] != plan["every_steps"]:
        more = now["lost_share"] - plan["lost_share"]
        beside = f"{_percent(more)} more" if now["lost_share"] < 1 else "the run would hardly ever end"
        said.append(
            f"checkpoints as configured, every {now['every_steps']:,} steps ({duration(now['interval_s'] / 3600)}), "
            f"lose {_percent(now['lost_share'])} of the time: {beside}"
        )
    said.append(
        f"checkpoint interval: {duration(plan['young_s'] / 3600)} by Young (1974), "
        f"{duration(plan['daly_s'] / 3600)} by Daly (2006)"
    )
    return said


def _lost(plan: Mapping[str, Any]) -> str:
    loss = plan["loss"]
    parts = f"writing {_percent(loss['writing'])}, rework {_percent(loss['rework'])}"
    return f"{_percent(plan['lost_share'])} of the time: {parts}, restarts {_percent(loss['restart'])}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def failure_assumptions(planner: Planner, cluster: Cluster, failures: Failures) -> list[str]:
    """Return the assumptions about failures and checkpoints."""
    layout = planner.layout
    one = Checkpoint.of(layout.trained_size, layout.target_size, cluster.world, failures)
    source = GPU_HOURS_SOURCE if failures.gpu_hours == GPU_HOURS else "--mtbf"
    storage = "assumed, --storage" if failures.storage == STORAGE else "--storage"
    restart = "assumed, --restart" if failures.restart_s == RESTART_S else "--restart"
    return [
        (
            f"failures: independent and exponential, one GPU stops the job every {_count(failures.gpu_hours)} hours "
            f"({source})"
        ),
        (
            f"checkpoints: {one.size / 1e9:.3g} GB; a step waits {duration(one.delay_s / 3600)} (its copy to the host "
            f"at {HOST_COPY / 1e9:.0f} GB/s per GPU and {DRAIN_S:g} s to drain the device, assumed), and the writing "
            f"beside the steps takes {duration(one.durable_s / 3600)} ({failures.storage / 1e9:g} GB/s, {storage}); "
            f"the next one waits for it"
        ),
        (
            f"restart: {duration(failures.restart_s / 3600)} until the job makes steps again ({restart}), and the "
            "reading of the checkpoint at the same rate"
        ),
    ]


def scaling_rows(points: dict[str, list[Point]], kind: str, least: int = 1) -> list[tuple[str, ...]]:
    """Return one row of `SCALING_COLUMNS` per number of GPUs of a kind, from `least` GPUs on."""
    rows = []
    for point, share in zip(points[kind], efficiency(points)[kind], strict=True):
        if point.gpus < least:
            continue
        gpus, batch = f"{point.gpus:,}", f"{point.global_batch:,}"
        if point.images_per_s is None or share is None or point.failures is None:
            rows.append((gpus, batch, "none fits", *[""] * 6))
            continue
        fails = point.failures
        copies = f" hpz {point.hpz_partition_size}" if (point.hpz_partition_size or 1) > 1 else ""
        rows.append(
            (
                gpus, batch, f"{point.stage}{copies}", f"{point.images_per_s:,.0f}", f"{share:.0%}",
                "never" if fails.hours is None else duration(fails.hours),
                "" if fails.expected is None else _count(fails.expected),
                f"{fails.every_steps:,} steps", _percent(fails.loss.total),
            )
        )  # fmt: skip
    return rows
