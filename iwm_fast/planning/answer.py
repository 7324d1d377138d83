"""The answer of `iwm-fast plan`: one document for programs, tables and sentences for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from iwm_fast.planning import fabric, plan, steptime
from iwm_fast.planning.length import training_steps
from iwm_fast.planning.plan import Choice, Cluster, Planner, Stage, stage_record
from iwm_fast.planning.scaling import Point
from iwm_fast.planning.steptime import image_flops

__all__ = ["document", "memory_rows", "sentences", "stage_rows"]


def document(
    planner: Planner, cluster: Cluster, stages: list[Stage], choice: Choice, images: int, *, images_assumed: bool
) -> dict[str, Any]:
    """Everything that was worked out, in bytes, seconds and operations; nothing in it was measured here."""
    config, drawn = planner.config, planner.tokens.images
    flops = {key: value / drawn for key, value in asdict(image_flops(config, planner.tokens)).items()}
    steps = training_steps(config, images)
    record: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "network_bytes_per_s": cluster.network,
            "data_images_per_s": cluster.data_rate,
            "gpu": asdict(cluster.device),
            "usable_bytes": cluster.usable,
        },
        "rate": asdict(cluster.rate),
        "model": {
            "trained_parameters": planner.layout.trained_size,
            "averaged_parameters": planner.layout.target_size,
            "context_tokens": float(planner.tokens.context.mean()),
            "predicted_tokens": float(planner.tokens.predicted.mean()),
            "flops_per_image": flops | {"total": sum(flops.values())},
        },
        "stages": [stage_record(stage, config, cluster.world) for stage in stages],
        "recommended": {"stage": choice.stage.stage if choice.stage else None, "why": choice.why},
        "assumptions": assumptions(cluster, images if images_assumed else None),
        "images": images,
        "steps": steps,
        "hours": None,
        "gpu_hours": None,
    }
    if choice.stage:
        hours = steps * choice.stage.time.total / 3600
        record["recommended"] |= {
            "micro_batch": choice.stage.micro_batch,
            "accumulation": choice.stage.accumulation,
            "images_per_s": config.train.global_batch / choice.stage.time.total,
        }
        record |= {"hours": hours, "gpu_hours": hours * cluster.world}
    return record


def assumptions(cluster: Cluster, images: int | None) -> list[str]:
    """What the plan rests on that nobody measured here."""
    rate, device = cluster.rate, cluster.device
    said = [
        f"compute: {rate.mfu:.0%} of {device.flops / 1e12:.0f} TFLOP/s, {rate.origin} ({rate.source})",
        f"GPU: data sheet, {device.source}",
        (
            f"links: {device.link_name} {device.link / 1e9:.0f} GB/s and network {cluster.network / 1e9:g} GB/s a GPU "
            f"and direction, {fabric.LINK_EFFICIENCY:.0%} of them assumed reached, hops of "
            f"{fabric.LINK_HOP_S * 1e6:.0f} and {fabric.NETWORK_HOP_S * 1e6:.0f} µs assumed"
        ),
        (
            f"memory: {plan.FRAGMENTED:.0%} lost to fragmentation and {plan.RESERVED / 1e9:.0f} GB for CUDA, NCCL and "
            f"decoding assumed; the optimizer's pass at {steptime.MEMORY_EFFICIENCY:.0%} of the memory's rate assumed"
        ),
    ]
    said.append("overlap: messages that can run beside the computation are assumed to, entirely; the others not at all")
    if cluster.data_rate is None:
        said.append("data: assumed never waited for; give --data-rate, images a second and GPU, to count them")
    if images is not None:
        said.append(f"{images:,} images assumed (ImageNet-1k); data.root names no folder here: give --images")
    return said


def stage_rows(stages: list[Stage], global_batch: int, chosen: Stage | None) -> list[tuple[str, ...]]:
    """A row a stage: micro-batch, memory, milliseconds, messages, images a second."""
    return [
        (
            f"{s.stage}{' *' if s is chosen else ''}",
            f"{s.micro_batch} × {s.accumulation}" if s.fits else f"none ({s.micro_batch} × {s.accumulation} too large)",
            f"{s.memory.total / 1e9:.1f}",
            f"{s.time.forward * 1e3:.1f}",
            f"{s.time.backward * 1e3:.1f}",
            f"{s.time.optimizer * 1e3:.1f}",
            f"{s.time.communication * 1e3:.1f} ({s.time.exposed * 1e3:.1f})",
            f"{s.time.link * 1e3:.1f} / {s.time.network * 1e3:.1f}",
            "–" if s.time.data is None else f"{s.time.data * 1e3:.1f}",
            f"{s.time.total * 1e3:.1f}",
            f"{global_batch / s.time.total:,.0f}",
        )
        for s in stages
    ]


def memory_rows(stages: list[Stage]) -> list[tuple[str, ...]]:
    """A row a stage: gigabytes of a rank by kind."""
    return [(str(s.stage), *(f"{value / 1e9:.2f}" for value in asdict(s.memory).values())) for s in stages]


def sentences(record: dict[str, Any], points: dict[str, list[Point]] | None) -> list[str]:
    """The recommendation, the length of the run and what all of it rests on."""
    recommended, cluster = record["recommended"], record["cluster"]
    gpus = cluster["nodes"] * cluster["gpus_per_node"]
    if recommended["stage"] is None:
        said = [f"recommended: none: {recommended['why']}"]
    else:
        said = [
            (
                f"recommended: zero.stage={recommended['stage']} train.micro_batch={recommended['micro_batch']}: "
                f"{recommended['why']}"
            ),
            (
                f"{record['steps']:,} steps at {recommended['images_per_s']:,.0f} images/s: {record['hours']:.1f} "
                f"hours, {record['gpu_hours']:,.0f} GPU-hours on {gpus} × {cluster['gpu']['name']}"
            ),
        ]
    for kind, label in (("strong", "same global batch"), ("weak", "same batch a GPU")) if points else ():
        last = [p for p in (points or {})[kind] if p.images_per_s is not None][-1:]
        said += [f"{label}, {p.gpus} GPUs: {p.images_per_s:,.0f} images/s, stage {p.stage}" for p in last]
    return [*said, *record["assumptions"]]
