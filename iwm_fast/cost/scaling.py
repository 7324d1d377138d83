"""Scaling of a run from 1 to 1,024 GPUs, and its plot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from iwm_fast.cost.plan import Cluster, Planner, Stage
from iwm_fast.file_names import valid_unicode

__all__ = ["MOST_GPUS", "Point", "draw_scaling", "scaling"]

MOST_GPUS = 1024


@dataclass(frozen=True)
class Point:
    """Images/s on a number of GPUs; None where nothing fits."""

    gpus: int
    global_batch: int
    stage: int | None
    micro_batch: int | None
    images_per_s: float | None
    activation_checkpointing: bool | None = None


def scaling(planner: Planner, cluster: Cluster) -> dict[str, list[Point]]:
    """Doubling the GPUs: "strong" with the run's global batch, "weak" with each GPU's share of it kept.

    The stage is the one recommended for `cluster`, or the one that is chosen where that does not fit.
    Up to gpus_per_node they are of one host, then whole hosts. Numbers that cannot share the batch evenly are left out.
    """
    config = planner.config
    share = max(1, config.train.global_batch // cluster.world)
    found: dict[str, list[Point]] = {"strong": [], "weak": []}
    recommended = planner.choose(planner.stages(cluster), cluster).stage
    stage = recommended.stage if recommended else None
    gpus = 1
    while gpus <= MOST_GPUS:
        at = _resized(cluster, gpus)
        if at is not None:
            if config.train.global_batch % gpus == 0:
                found["strong"].append(_point(planner, at, config.train.global_batch, stage))
            found["weak"].append(_point(planner, at, share * gpus, stage))
        gpus *= 2
    return found


def _resized(cluster: Cluster, gpus: int) -> Cluster | None:
    if gpus <= cluster.gpus_per_node:
        return replace(cluster, nodes=1, gpus_per_node=gpus)
    nodes, left = divmod(gpus, cluster.gpus_per_node)
    return None if left else replace(cluster, nodes=nodes)


def _point(planner: Planner, cluster: Cluster, global_batch: int, stage: int | None) -> Point:
    other = planner.with_batch(global_batch)
    stages = other.stages(cluster)
    same = next((s for s in stages if s.stage == stage and s.fits), None)
    chosen: Stage | None = same or other.choose(stages, cluster).stage
    if chosen is None:
        return Point(cluster.world, global_batch, None, None, None)
    rate = global_batch / chosen.time.total
    return Point(cluster.world, global_batch, chosen.stage, chosen.micro_batch, rate, chosen.recompute)


def draw_scaling(points: dict[str, list[Point]], title: str, path: Path) -> None:
    """Plot images/s over GPUs as PNG, both logarithmic, beside perfect scaling."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
    labels = {"strong": "same global batch", "weak": "same batch a GPU"}
    for (kind, label), marker in zip(labels.items(), ("o", "s"), strict=True):
        drawn = [(p.gpus, p.images_per_s) for p in points[kind] if p.images_per_s is not None]
        if drawn:
            axes.plot([g for g, _ in drawn], [r for _, r in drawn], marker=marker, label=label)
    fitting = [p for p in points["weak"] if p.images_per_s is not None]
    if fitting:
        first, rate = fitting[0].gpus, fitting[0].images_per_s or 0.0
        axes.plot([first, MOST_GPUS], [rate, rate * MOST_GPUS / first], "--", color="grey", label="perfect")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, planned", title=valid_unicode(title))
    axes.set_xticks([p.gpus for p in points["weak"]], [str(p.gpus) for p in points["weak"]])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
