"""Scaling of a run from 1 to 16,384 GPUs, with its failures, and its plot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from iwm_fast.config.batch import training_steps
from iwm_fast.cost.failures import Checkpoint, Failures, Interval
from iwm_fast.cost.plan import Cluster, Planner
from iwm_fast.file_names import valid_unicode

__all__ = ["MOST_GPUS", "Point", "draw_scaling", "efficiency", "scaling", "scaling_limits"]

MOST_GPUS = 16384
Kind = Literal["strong", "weak"]


@dataclass(frozen=True)
class Point:
    """Images/s on a number of GPUs; None where nothing fits. steps: of the run. failures: with the checkpoints that
    take the least time.
    """

    gpus: int
    global_batch: int
    stage: int | None
    micro_batch: int | None
    images_per_s: float | None
    activation_checkpointing: bool | None = None
    hpz_partition_size: int | None = None
    steps: int | None = None
    step_s: float | None = None
    hours: float | None = None
    failures: Interval | None = None


def scaling(planner: Planner, cluster: Cluster, images: int, failures: Failures) -> dict[str, list[Point]]:
    """Doubling the GPUs: "strong" with the run's global batch, "weak" with each GPU's share of it kept.

    Each point has the setting that is recommended on its GPUs. Up to gpus_per_node they are of one host, then whole
    hosts. images: of the data set. A global batch that the GPUs cannot
    share evenly is rounded to one that they can (`Point.global_batch`); with more GPUs than images of a batch there is
    no strong point, and with more images of a batch than of the data set no weak one (`scaling_limits`).
    """
    config = planner.config
    batch = config.train.global_batch
    share = max(1, batch // cluster.world)
    found: dict[str, list[Point]] = {"strong": [], "weak": []}
    for gpus in _sizes(cluster):
        at = _resized(cluster, gpus)
        if gpus <= batch:
            found["strong"].append(_point(planner, at, round(batch / gpus) * gpus, images, failures))
        if share * gpus <= max(images, batch):
            found["weak"].append(_point(planner, at, share * gpus, images, failures))
    return found


def _sizes(cluster: Cluster) -> list[int]:
    """Powers of two within a host, a whole host, doubled hosts, and the cluster itself."""
    host = cluster.gpus_per_node
    within = [2**k for k in range(host.bit_length()) if 2**k < host]
    hosts = [host * 2**k for k in range(MOST_GPUS.bit_length()) if host * 2**k <= MOST_GPUS]
    return sorted({*within, *(hosts or [host]), cluster.world})


def _resized(cluster: Cluster, gpus: int) -> Cluster:
    if gpus < cluster.gpus_per_node:
        return replace(cluster, nodes=1, gpus_per_node=gpus)
    return replace(cluster, nodes=gpus // cluster.gpus_per_node)


def _point(planner: Planner, cluster: Cluster, global_batch: int, images: int, failures: Failures) -> Point:
    other = planner.with_batch(global_batch)
    chosen = other.choose(other.stages(cluster), cluster).stage
    if chosen is None:
        return Point(cluster.world, global_batch, None, None, None)
    step_s = chosen.time.total
    steps = other.config.train.steps or training_steps(other.config, images)
    layout, world = planner.layout, cluster.world
    checkpoint = Checkpoint.of(layout.trained_size, layout.target_size, world, failures)
    return Point(
        world, global_batch, chosen.stage, chosen.micro_batch, global_batch / step_s, chosen.recompute, chosen.hpz,
        steps, step_s, steps * step_s / 3600, Interval.of(checkpoint, failures, world, steps, step_s),
    )  # fmt: skip


def scaling_limits(planner: Planner, cluster: Cluster, images: int) -> list[str]:
    """Return why some numbers of GPUs have no point, or another global batch than the run's."""
    batch, sizes, said = planner.config.train.global_batch, _sizes(cluster), []
    share = max(1, batch // cluster.world)
    rounded = [gpus for gpus in sizes if gpus <= batch and batch % gpus]
    if rounded:
        first = rounded[0]
        said.append(
            f"same global batch: {first:,} GPUs do not divide train.global_batch {batch:,}; planned with "
            f"{round(batch / first) * first:,} images there, and with the nearest multiple on more"
        )
    if sizes[-1] > batch:
        said.append(
            f"same global batch: ends at {max(g for g in sizes if g <= batch):,} GPUs, because train.global_batch "
            f"{batch:,} has fewer images than there are more GPUs; raise it"
        )
    if sizes[-1] * share > max(images, batch):
        most = max((g for g in sizes if g * share <= max(images, batch)), default=sizes[0])
        said.append(
            f"same batch per GPU: ends at {most:,} GPUs, because {share:,} images per GPU on more are more than the "
            f"data set's {images:,}"
        )
    return said


def efficiency(points: dict[str, list[Point]]) -> dict[str, list[float | None]]:
    """Return each point's images/s per GPU over the best point's of all."""
    each = {
        kind: [None if p.images_per_s is None else p.images_per_s / p.gpus for p in line]
        for kind, line in points.items()
    }
    best = max((rate for line in each.values() for rate in line if rate is not None), default=1.0)
    return {kind: [None if rate is None else rate / best for rate in line] for kind, line in each.items()}


def draw_scaling(points: dict[str, list[Point]], title: str, path: Path) -> None:
    """Plot images/s over GPUs as PNG, both logarithmic, beside perfect scaling; below it the shares of perfect images/s
    and of the time lost to failures.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rates, shares) = plt.subplots(
        2, 1, figsize=(7.5, 7.0), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    known = [p for line in points.values() for p in line if p.images_per_s is not None]
    per_gpu = max((p.images_per_s or 0.0) / p.gpus for p in known) if known else 0.0
    of_perfect = efficiency(points)
    labels = {"strong": ("same global batch", "C0", "o"), "weak": ("same batch per GPU", "C1", "s")}
    for kind, (label, color, marker) in labels.items():
        line = [p for p in points[kind] if p.images_per_s is not None]
        if not line:
            continue
        images = line[0].global_batch // (1 if kind == "strong" else line[0].gpus)
        gpus = [p.gpus for p in line]
        style = {"color": color, "marker": marker, "markersize": 5}
        rates.plot(gpus, [p.images_per_s or 0.0 for p in line], label=f"{label}: {images:,}", **style)
        shares.plot(
            gpus,
            [100 * share for share in of_perfect[kind] if share is not None],
            label=f"images/s, of perfect: {label}",
            **style,
        )
        lost = [100 * p.failures.loss.total if p.failures else 0.0 for p in line]
        hollow = style | {"linestyle": ":", "markerfacecolor": "white"}
        shares.plot(gpus, lost, label=f"time lost to failures: {label}", **hollow)
    if known:
        ends = [min(p.gpus for p in known), max(p.gpus for p in known)]
        rates.plot(ends, [per_gpu * g for g in ends], "--", color="grey", label="perfect")
        rates.legend(loc="upper left")
        shares.legend(fontsize="small")
    rates.set(xscale="log", yscale="log", ylabel="images/s, planned", title=valid_unicode(title))
    shares.set(xscale="log", xlabel="GPUs", ylabel="%", ylim=(0, 105))
    sizes = sorted({p.gpus for p in known})
    shown = sizes[:: 1 if len(sizes) < 10 else 2]
    shares.set_xticks(shown, [f"{g:,}" for g in shown])
    for axes in (rates, shares):
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
