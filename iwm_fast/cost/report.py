"""The result of `iwm-fast plan`: a document for programs, tables and sentences for people, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from iwm_fast.config import Config
from iwm_fast.config.batch import said_in_steps, training_steps, warmup_steps
from iwm_fast.config.conflicts import length_conflicts
from iwm_fast.cost import communication, plan, step_time
from iwm_fast.cost.failure_report import failure_assumptions, failure_record, failure_sentences
from iwm_fast.cost.failures import Failures
from iwm_fast.cost.left_out import left_out
from iwm_fast.cost.plan import Choice, Cluster, Planner, Stage, stage_record
from iwm_fast.cost.scaling import Point
from iwm_fast.cost.step_time import StepTime, image_flops
from iwm_fast.cost.units import duration, of_gpus

__all__ = [
    "ImageCount",
    "document",
    "duration",
    "left_out_rows",
    "memory_columns",
    "memory_rows",
    "message_rows",
    "of_gpus",
    "sentences",
    "stage_rows",
]


@dataclass(frozen=True)
class ImageCount:
    """The number of images that a plan is for. why: the source of the count, or why it is assumed."""

    count: int
    origin: Literal["given", "counted", "assumed"]
    why: str


def document(
    planner: Planner, cluster: Cluster, images: ImageCount, failures: Failures | None = None
) -> dict[str, Any]:
    """Return every computed number, in bytes, seconds and FLOPs; none is measured here.

    Raises UserError if the ranks cannot divide the global batch.
    """
    config, sampled = planner.config, planner.tokens.images
    variants, configured = planner.variants(cluster), planner.configured(cluster)
    stages = planner.best(variants)
    choice = planner.choose(stages, cluster)
    flops = {key: value / sampled for key, value in asdict(image_flops(config, planner.tokens)).items()}
    schedule = training_steps(config, images.count)
    steps = config.train.steps or schedule
    fails = failures or Failures()
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
            "frozen_parameters": planner.layout.frozen_size,
            "context_tokens": planner.tokens.seen / len(planner.tokens.context),
            "predicted_tokens": planner.tokens.asked / len(planner.tokens.predicted),
            "flops_per_image": flops | {"total": sum(flops.values())},
        },
        "stages": [stage_record(stage, config, cluster.fabric) for stage in stages],
        "variants": [stage_record(stage, config, cluster.fabric) for stage in variants],
        "configured": stage_record(configured, config, cluster.fabric) | _length(steps, configured, cluster),
        "recommended": _recommended(planner, choice, configured, steps, cluster),
        "left_out": left_out(planner, variants, choice.stage, cluster),
        "warnings": warnings(config, images, (choice.stage or configured).time),
        "assumptions": [*assumptions(cluster, config, images), *failure_assumptions(planner, cluster, fails)],
        "images": images.count,
        "images_origin": images.origin,
        "steps": steps,
        "schedule_steps": schedule,
        "warmup_steps": warmup_steps(config, images.count),
        "in_steps": said_in_steps(config, images.count),
        "hours": None,
        "gpu_hours": None,
        "failures": failure_record(planner, cluster, choice.stage, steps, images.count, fails),
    }
    return record | (_length(steps, choice.stage, cluster) if choice.stage else {})


def _length(steps: int, stage: Stage, cluster: Cluster) -> dict[str, float]:
    hours = steps * stage.time.total / 3600
    return {"hours": hours, "gpu_hours": hours * cluster.world}


def _recommended(planner: Planner, choice: Choice, configured: Stage, steps: int, cluster: Cluster) -> dict[str, Any]:
    """Return the recommended setting, the keys to change, and the gain over the configuration."""
    stage = choice.stage
    if stage is None:
        return {"stage": None, "why": choice.why}
    before, after = _length(steps, configured, cluster), _length(steps, stage, cluster)
    gain = {
        "hours": before["hours"] - after["hours"],
        "gpu_hours": before["gpu_hours"] - after["gpu_hours"],
        "time_share": 1 - after["hours"] / before["hours"],
        "memory_bytes": configured.memory.total - stage.memory.total,
    }
    return {
        "stage": stage.stage,
        "why": choice.why,
        "activation_checkpointing": stage.recompute,
        "hpz_partition_size": stage.hpz,
        "micro_batch": stage.micro_batch,
        "accumulation": stage.accumulation,
        "images_per_s": planner.config.train.global_batch / stage.time.total,
        "memory_bytes": stage.memory.total,
        "change": changes(planner, configured, stage),
        "gain": gain if configured.fits else None,
    }


def warnings(config: Config, images: ImageCount, time: StepTime) -> list[str]:
    """Return what limits the result: a data set that was not found or is small, passes bound by launches."""
    said = []
    if images.origin == "assumed" and config.data.root is not None:
        said.append(f"{images.why}: planned for {images.count:,} images (ImageNet-1k); give --images")
    if images.count < config.train.global_batch:
        often = config.train.global_batch / images.count
        said.append(
            f"the data set has {images.count:,} images, and train.global_batch is {config.train.global_batch:,}: each "
            f"step has an image {often:.3g} times; lower train.global_batch"
        )
    if images.origin != "assumed":
        said += length_conflicts(config, images.count)
    if time.forward + time.backward <= time.launches:
        said.append(
            "launching kernels takes longer than computing them: a larger batch per GPU takes no more time per step"
        )
    return said


def assumptions(cluster: Cluster, config: Config, images: ImageCount) -> list[str]:
    """Return the assumptions of the plan, none of them measured here."""
    rate, device, precision = cluster.rate, cluster.device, config.train.precision
    said = [
        (
            f"compute: {rate.mfu:.0%} of {device.rate(precision) / 1e12:.3g} TFLOP/s in {precision}, {rate.origin} "
            f"({rate.source}), for every micro-batch alike"
        ),
        f"GPU: data sheet, {device.source}",
        (
            f"links: {device.link_name} {device.link / 1e9:.0f} GB/s and network {cluster.network / 1e9:g} GB/s per "
            f"GPU and direction, {communication.LINK_EFFICIENCY:.0%} of them assumed reached, hops of "
            f"{communication.LINK_HOP_S * 1e6:.0f} and {communication.NETWORK_HOP_S * 1e6:.0f} µs assumed"
        ),
        (
            f"memory: {plan.FRAGMENTED:.0%} lost to fragmentation and {plan.RESERVED / 1e9:.0f} GB for CUDA, NCCL and "
            f"decoding assumed; the optimizer's pass at {step_time.MEMORY_EFFICIENCY:.0%} of the memory's rate assumed"
        ),
    ]
    said.append(
        f"launches: {step_time.LAUNCH_S * 1e6:.0f} µs of the host assumed per block forward, twice that backward"
    )
    if config.train.static_shapes:
        said.append("static shapes: their padding is counted, except the target's; FLOPs and MFU are without padding")
    if config.train.cuda_graph:
        said.append(
            "CUDA graphs: no launches counted, and no message overlaps the backward pass; not measured on a GPU yet"
        )
    said.append("overlap: messages that can overlap the computation are assumed to, fully; the others not at all")
    if cluster.data_rate is None:
        said.append("data: assumed to be ready; give --data-rate, in images per second and GPU, to include loading")
    if images.origin == "assumed":
        said.append(f"{images.count:,} images assumed (ImageNet-1k); {images.why}: give --images")
    return said


def stage_rows(
    variants: Sequence[dict[str, Any]], global_batch: int, recommended: dict[str, Any]
) -> list[tuple[str, ...]]:
    """Return one row per variant: recomputation, micro-batch, memory, milliseconds (with data loading if its rate is
    given), images/s; * is recommended.
    """
    return [
        (
            f"{_label(s)}{' *' if _is_recommended(s, recommended) else ''}",
            "yes" if s["activation_checkpointing"] else "no",
            _batch(s),
            _shown(s["memory_bytes"]["total"] / 1e9, 1),
            *(_shown(s["step_s"][part] * 1e3, 1) for part in ("forward", "backward", "optimizer")),
            _shown(s["step_s"]["exposed"] * 1e3, 1),
            *([] if s["step_s"]["data"] is None else [_shown(s["step_s"]["data"] * 1e3, 1)]),
            _shown(s["step_s"]["total"] * 1e3, 1),
            f"{global_batch / s['step_s']['total']:,.0f}",
        )
        for s in variants
    ]


def message_rows(variants: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one row per variant: milliseconds of a step's messages, of those not overlapped, and by link type."""
    return [
        (
            _label(s),
            "yes" if s["activation_checkpointing"] else "no",
            *(_shown(s["step_s"][part] * 1e3, 1) for part in ("communication", "exposed", "link", "network")),
        )
        for s in variants
    ]


def memory_columns(variants: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names of the columns of `memory_rows`."""
    names = {"ema": "EMA", "host_copy": "host copy"}
    return ("ZeRO", "recompute", *(names.get(kind, kind) for kind in _memory_kinds(variants)))


def _memory_kinds(variants: Sequence[dict[str, Any]]) -> list[str]:
    kinds = ["parameters", "gradients", "optimizer", "ema", "activations", "workspace"]
    return kinds + (["host_copy"] if any(s["memory_bytes"]["host_copy"] for s in variants) else [])


def memory_rows(variants: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return one row per variant: gigabytes per rank by kind."""
    kinds = _memory_kinds(variants)
    return [
        (
            _label(s),
            "yes" if s["activation_checkpointing"] else "no",
            *(_shown(s["memory_bytes"][kind] / 1e9, 2) for kind in kinds),
        )
        for s in variants
    ]


def left_out_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row per setting that is not recommended, with the reason."""
    return [
        (_label(entry), "yes" if entry["activation_checkpointing"] else "no", entry["why"])
        for entry in record["left_out"]
    ]


def _label(setting: Mapping[str, Any]) -> str:
    """The stage, and how many ranks of a host hold a copy of the parameters, if any."""
    size = setting.get("hpz_partition_size", 1)
    return f"{setting['stage']} hpz {size}" if size > 1 else str(setting["stage"])


def _is_recommended(stage: dict[str, Any], recommended: dict[str, Any]) -> bool:
    own = ("stage", "activation_checkpointing", "hpz_partition_size")
    return all(stage[key] == recommended.get(key) for key in own)


def _batch(stage: dict[str, Any]) -> str:
    size = f"{stage['micro_batch']} × {stage['accumulation']}"
    return size if stage["fits"] else f"none ({size} too large)"


def _shown(value: float, digits: int) -> str:
    """Return a number with `digits` decimals; small ones with two digits, so that no nonzero number is shown as 0."""
    plain = f"{value:.{digits}f}"
    if value and float(plain) == 0:
        return f"{value:.2g}" if value >= 1e-3 else "<0.001"
    return plain


def sentences(record: dict[str, Any], points: dict[str, list[Point]] | None) -> list[str]:
    """Return the recommendation, its changes and gain, the length of the run, and the assumptions."""
    recommended = record["recommended"]
    said = [f"note: {line}" for line in record["warnings"]]
    if recommended["stage"] is None:
        said.append(f"recommended: none: {recommended['why']}")
    else:
        said += _advice(record)
    said += failure_sentences(record)
    for kind, label in (("strong", "same global batch"), ("weak", "same batch per GPU")) if points else ():
        last = [p for p in (points or {})[kind] if p.images_per_s is not None][-1:]
        said += [f"{label}, {p.gpus:,} GPUs: {p.images_per_s:,.0f} images/s, stage {p.stage}" for p in last]
    said += record.get("scaling_limits", [])
    return [*said, *record["in_steps"], *record["assumptions"]]


def _advice(record: dict[str, Any]) -> list[str]:
    recommended, configured, cluster = record["recommended"], record["configured"], record["cluster"]
    gpus, usable = cluster["nodes"] * cluster["gpus_per_node"], cluster["usable_bytes"] / 1e9
    now = (
        f"as configured ({keys(configured)}): {configured['memory_bytes']['total'] / 1e9:.1f} of {usable:.0f} GB usable"
    )
    if configured["fits"]:
        now += f", {duration(configured['hours'])}, {of_gpus(configured['gpu_hours'])}"
    else:
        now += ", does not fit"
    said = [
        f"recommended: {keys(recommended)}: {recommended['why']}",
        (
            f"{record['steps']:,} steps at {recommended['images_per_s']:,.0f} images/s: {duration(record['hours'])}, "
            f"{of_gpus(record['gpu_hours'])} on {gpus} × {cluster['gpu']['name']}"
        ),
        now,
    ]
    if record["steps"] != record["schedule_steps"]:
        said.append(
            f"train.steps ends the run at {record['steps']:,} of its schedule's {record['schedule_steps']:,} steps"
        )
    if not recommended["change"]:
        return [*said, "change: nothing; the configuration is the recommended setting"]
    return [*said, f"change: {recommended['change']}", _gain(record)]


def _gain(record: dict[str, Any]) -> str:
    recommended = record["recommended"]
    before, after = record["configured"]["memory_bytes"]["total"], recommended["memory_bytes"]
    memory = f"{before / 1e9:.1f} → {after / 1e9:.1f} GB of a GPU's memory"
    gain = recommended["gain"]
    if gain is None:
        return f"gain: it fits; {memory}"
    if abs(gain["time_share"]) < 5e-4:
        return f"gain: no planned time (the rate is assumed the same for every micro-batch); {memory}"
    word = "less" if gain["time_share"] > 0 else "more"
    return (
        f"gain: {duration(abs(gain['hours']))} ({abs(gain['time_share']):.1%}) and {of_gpus(abs(gain['gpu_hours']))} "
        f"{word}; {memory}"
    )


def keys(stage: Mapping[str, Any]) -> str:
    """Return the overrides of a setting, for the command line."""
    size = stage["hpz_partition_size"]
    copies = f"zero.hpz_partition_size={size} " if size > 1 else ""
    recompute = str(stage["activation_checkpointing"]).lower()
    return (
        f"zero.stage={stage['stage']} {copies}train.activation_checkpointing={recompute} "
        f"train.micro_batch={stage['micro_batch']}"
    )


def changes(planner: Planner, configured: Stage, recommended: Stage) -> str:
    """Return the overrides to apply, one line to paste; empty if the configuration is the recommended setting.

    train.micro_batch is a maximum: one that already gives the recommended micro-batch is not changed.
    """
    config = planner.config
    words = []
    if config.train.activation_checkpointing != recommended.recompute:
        words.append(f"train.activation_checkpointing={str(recommended.recompute).lower()}")
    if configured.micro_batch != recommended.micro_batch:
        words.append(f"train.micro_batch={recommended.micro_batch}")
    if config.zero.stage != recommended.stage:
        words.append(f"zero.stage={recommended.stage}")
    if config.zero.hpz_partition_size != recommended.hpz:
        words.append(f"zero.hpz_partition_size={recommended.hpz}")
    return " ".join(words)
