"""`iwm-fast plan`: memory, time and cost of a run before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iwm_fast.commands.options import CONFIG_HELP, Json, Overrides, answer
from iwm_fast.outputs import require_file

if TYPE_CHECKING:
    from iwm_fast.config import Config
    from iwm_fast.planning.plan import Planner
    from iwm_fast.planning.tokens import Tokens

__all__ = ["plan", "planner_of", "tokens_of"]

_IMAGENET_1K = 1_281_167


def _drawable(plot: Path | None) -> Path | None:
    if plot is not None:
        require_file(plot, "--plot")
    return plot


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Hosts.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of each, one rank a GPU.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="h200, h100, a100, a100-40gb, b200 or l40s.")] = "h200",
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Images of the set; default: counted in data.root.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the GPU's rate; default: a result's.")
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", min=0.01, help="GB/s of one GPU between hosts, one direction.")
    ] = None,
    data_rate: Annotated[
        float | None, typer.Option("--data-rate", min=0.01, help="Images/s that the input path makes for a GPU.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="DIR", help="Measurements; default: benchmarks/results.")
    ] = None,
    json: Json = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", callback=_drawable, help="Draw the scaling to 1,024 GPUs.")
    ] = None,
) -> None:
    """Work out memory by kind, step time by part, hours and the ZeRO stage to choose, without a GPU."""
    from iwm_fast.config.load import find_config, load_config

    loaded = load_config(find_config(config), overrides or [])
    from dataclasses import asdict

    from iwm_fast.console import print_table
    from iwm_fast.planning import answer as said
    from iwm_fast.planning.devices import find_device
    from iwm_fast.planning.plan import Cluster
    from iwm_fast.planning.rates import compute_rate, packaged_results
    from iwm_fast.planning.scaling import draw_scaling, scaling

    device = find_device(gpu)
    planner = planner_of(loaded)
    rate = compute_rate(device, planner.operations, results or packaged_results(), mfu)
    cluster = Cluster(device, nodes, gpus_per_node, rate, network * 1e9 if network else device.network, data_rate)
    counted = images or _counted(loaded.data.root)
    stages = planner.stages(cluster)
    choice = planner.choose(stages, cluster)
    record = said.document(planner, cluster, stages, choice, counted or _IMAGENET_1K, images_assumed=counted is None)
    points = scaling(planner, cluster) if json or plot else None
    if points:
        record["scaling"] = {kind: [asdict(p) for p in line] for kind, line in points.items()}

    def show() -> None:
        columns = (
            "stage", "micro-batch", "GB a GPU", "forward ms", "backward ms", "optimizer ms", "messages ms (not hidden)",
            f"{device.link_name} / network ms", "data ms", "step ms", "images/s",
        )  # fmt: skip
        print_table("planned step", columns, said.stage_rows(stages, loaded.train.global_batch, choice.stage))
        print_table(
            "GB of a GPU by kind",
            ("stage", "parameters", "gradients", "optimizer", "EMA", "activations", "workspace"),
            said.memory_rows(stages),
        )
        for line in said.sentences(record, points):
            print(line)

    answer(json, "plan", record, show)
    if plot and points:
        draw_scaling(
            points, f"{Path(config).name} on {device.name}, {gpus_per_node} a host; compute {rate.origin}", plot
        )


def planner_of(config: Config, images: int = 2048) -> Planner:
    """A planner with the token counts of the run's first images, as training draws them.

    With I-JEPA's masks the mean of 2,048 context lengths is known to about 0.3 %.
    """
    from iwm_fast.data.loader import divide_batch
    from iwm_fast.planning.plan import Planner

    return Planner(config, tokens_of(config, images), divide_batch)


def tokens_of(config: Config, images: int) -> Tokens:
    """How many tokens each source of the run's first images has, by the masks that training draws."""
    import numpy as np

    from iwm_fast.data.masks import MaskSampler
    from iwm_fast.planning.tokens import Tokens

    exclude = "geometric" not in config.actions.groups
    sources = config.views.sources_per_target
    sampler = MaskSampler(config.masks, config.model.grid, config.train.seed, exclude=exclude, sources=sources)
    patches = sampler.draw(np.zeros(images, np.int64), np.arange(images, dtype=np.int64))
    own = config.model.predictor.kind == "mlp"  # it answers for the context's own patches
    return Tokens(patches.context_lengths, patches.context_lengths if own else patches.target_lengths, sources)


def _counted(root: str | None) -> int | None:
    """How many images data.root holds; None where it is not set or not on this machine."""
    if root is None or not Path(root).is_dir():
        return None
    from iwm_fast.data.files import list_images

    return len(list_images(root))
