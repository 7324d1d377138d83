"""`iwm-fast plan`: memory, time and cost of a run before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iwm_fast.cli.completion import config_files
from iwm_fast.cli.options import CONFIG_HELP, Json, Overrides, answer
from iwm_fast.errors import UserError
from iwm_fast.outputs import require_file

if TYPE_CHECKING:
    from iwm_fast.config import Config
    from iwm_fast.cost.plan import Planner
    from iwm_fast.cost.report import ImageCount

__all__ = ["plan", "planner_of"]

_IMAGENET_1K = 1_281_167


def _drawable(plot: Path | None) -> Path | None:
    if plot is not None:
        require_file(plot, "--plot")
    return plot


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, autocompletion=config_files)],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Hosts.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs per host, one rank per GPU.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="h200, h100, a100, a100-40gb, b200 or l40s.")] = "h200",
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Number of images; default: counted in data.root.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the GPU's peak; default: from a result.")
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", min=0.01, max=1e6, help="GB/s per GPU between hosts, one direction.")
    ] = None,
    data_rate: Annotated[
        float | None, typer.Option("--data-rate", min=0.01, max=1e9, help="Images/s of the data pipeline per GPU.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", metavar="DIR", help="Folder of bench results; default: benchmarks/results."),
    ] = None,
    mtbf: Annotated[
        float | None,
        typer.Option("--mtbf", min=0.01, max=1e9, help="Hours between failures of one GPU; default: 50,677 (Llama 3)."),
    ] = None,
    storage: Annotated[
        float | None,
        typer.Option("--storage", min=0.001, max=1e6, help="GB/s of all hosts to storage; default: 5, assumed."),
    ] = None,
    restart: Annotated[
        float | None,
        typer.Option("--restart", min=0.0, max=1e6, help="Seconds from a failure to a step; default: 300, assumed."),
    ] = None,
    json: Json = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", callback=_drawable, help="Plot the scaling to 16,384 GPUs.")
    ] = None,
) -> None:
    """Compute memory, step time and hours, and the best micro-batch, recomputation and ZeRO stage, without a GPU.

    Every ZeRO stage is tried without and with activation checkpointing, each at the largest micro-batch that fits. The
    result says what to change in the configuration, as overrides to paste, the gain, and why others were left out; how
    the run scales to 16,384 GPUs; and how often it will fail, with the checkpoint interval that loses the least time.
    """
    from iwm_fast.config.load import find_config, load_config

    loaded, counted = _images_of(load_config(find_config(config), overrides or []), images)
    from dataclasses import asdict

    from iwm_fast.console import print_lines, print_table
    from iwm_fast.cost import report as said
    from iwm_fast.cost.devices import compute_rate, find_device, packaged_results
    from iwm_fast.cost.failure_report import SCALING_COLUMNS, scaling_rows
    from iwm_fast.cost.failures import GPU_HOURS, RESTART_S, STORAGE, Failures
    from iwm_fast.cost.plan import Cluster
    from iwm_fast.cost.scaling import draw_scaling, scaling, scaling_limits

    device = find_device(gpu)
    if results is not None and not results.is_dir():
        raise UserError(f"--results {results}: no such folder; give one with results of bench step, or leave it out")
    planner = planner_of(loaded)
    origin = results or packaged_results()
    rate = compute_rate(device, planner.operations, origin, mfu, loaded.train.precision)
    cluster = Cluster(device, nodes, gpus_per_node, rate, network * 1e9 if network else device.network, data_rate)
    failures = Failures(
        mtbf or GPU_HOURS, storage * 1e9 if storage else STORAGE, RESTART_S if restart is None else restart
    )
    record = said.document(planner, cluster, counted, failures)
    points = scaling(planner, cluster, counted.count, failures)
    record["scaling"] = {kind: [asdict(p) for p in line] for kind, line in points.items()}
    record["scaling_limits"] = scaling_limits(planner, cluster, counted.count)

    def show() -> None:
        columns = (
            "ZeRO", "recompute", "micro batch", "GB per GPU", "forward", "backward", "optimizer",
            "messages not hidden", *(["data"] if data_rate else []), "step", "images/s",
        )  # fmt: skip
        rows = said.stage_rows(record["variants"], loaded.train.global_batch, record["recommended"])
        print_table("planned step, ms (* recommended)", columns, rows)
        print_table(
            "messages between GPUs per step, ms",
            ("ZeRO", "recompute", "all", "not hidden", device.link_name, "network"),
            said.message_rows(record["variants"]),
        )
        print_table(
            "GB per GPU by kind",
            said.memory_columns(record["variants"]),
            said.memory_rows(record["variants"]),
        )
        print_table("not recommended", ("ZeRO", "recompute", "why"), said.left_out_rows(record))
        for kind, label in (("weak", "same batch per GPU"), ("strong", "same global batch")):
            rows = scaling_rows(points, kind, min(8, cluster.world))
            print_table(f"scaling with the {label}", SCALING_COLUMNS, rows)
        print_lines(said.sentences(record, points))

    answer(json, "plan", record, show)
    if plot:
        draw_scaling(
            points, f"{Path(config).name} on {device.name}, {gpus_per_node} GPUs per host; compute {rate.origin}", plot
        )


def planner_of(config: Config, images: int = 2048) -> Planner:
    """Return a planner with the token counts of the run's first images, with masks as in training.

    With I-JEPA's masks the mean of 2,048 context lengths is known to about 0.3 %.
    """
    from iwm_fast.cost.plan import Planner
    from iwm_fast.cost.tokens import tokens_of

    return Planner(config, tokens_of(config, images))


def _images_of(config: Config, given: int | None) -> tuple[Config, ImageCount]:
    """Return the configuration with the actions of a manifest of triplets, if there is one, and the number of images.

    Raise UserError for data on this machine that a training would refuse.
    """
    from iwm_fast.cost.report import ImageCount
    from iwm_fast.data.image_list import list_images
    from iwm_fast.data.sources.s3 import is_address
    from iwm_fast.data.triplets import resolve_triplets

    root, why = config.data.root, ""
    if root is None:
        why = "data.root is not set"
    elif is_address(root):
        why = f"data.root: {root}: an object store, which plan does not list"
    elif not Path(root).exists():
        why = f"data.root: {root}: not on this machine"
    triplets = None
    if root is not None and not why:
        config, triplets = resolve_triplets(config)
    if given is not None:
        return config, ImageCount(given, "given", "--images")
    if why:
        return config, ImageCount(_IMAGENET_1K, "assumed", why)
    count = len(triplets) if triplets is not None else len(list_images(str(root), config.data.source))
    return config, ImageCount(count, "counted", f"data.root: {root}")
