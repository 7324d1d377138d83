"""`iwm-fast bench`: time the parts of training on this machine, and compare two results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from iwm_fast.cli.options import Device, Json, Threads, answer
from iwm_fast.errors import UserError
from iwm_fast.measure.device import only_rank

__all__ = ["app"]

app = typer.Typer(
    help="Time kernels, step, data and scaling on this machine, and compare two results.", no_args_is_help=True
)

Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed calls, after the warm-up.")]


@app.command(epilog="Example: iwm-fast bench step --preset cpu-tiny train.global_batch=16 --json a.json")
def step(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE...", help="Override keys of the preset.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", help="cpu-micro, cpu-tiny, cpu-tiny-bf16, gpu-small, gpu-base, ...")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="Time this configuration instead of a preset.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Read these images through DALI. Default: random pixels."),
    ] = None,
    device: Device = None,
    repeats: Repeats = 30,
    warm_up: Annotated[
        int,
        typer.Option(
            "--warm-up", min=0, help="Minimum of warm-up steps; they continue until 4 in a row compile nothing."
        ),
    ] = 3,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Time the training step as pretrain runs it, after checking its loss against float64."""
    from iwm_fast.benchmarks.cases.presets import PRESETS, preset_config
    from iwm_fast.benchmarks.step import measure_step
    from iwm_fast.config.load import find_config, load_config

    if config is not None and preset:
        raise UserError(f"--config {config}: cannot be given with --preset {preset[0]}; give one of them")
    ranks = only_rank(device, threads)
    changes = tuple(overrides or ())
    if config is not None:
        chosen = {Path(config).stem: load_config(find_config(config), changes)}
    else:
        names = preset or [name for name, p in PRESETS.items() if p.device == ranks.device.type]
        chosen = {name: preset_config(name, changes) for name in names}
    rows: list[dict[str, Any]] = []
    body = {"device": ranks.device.type, "threads": threads, "rows": rows}
    for name, one in chosen.items():
        rows.append(measure_step(name, one, ranks, root=data, repeats=repeats, warm_up=warm_up, say=_progress))
        if json not in (None, "-"):
            answer(json, "bench-step", body)  # a stopped run keeps its rows
    answer(json, "bench-step", body, lambda: _print_steps(rows))


def _print_steps(rows: list[dict[str, Any]]) -> None:
    from iwm_fast.benchmarks.parts.report_sections import images_of
    from iwm_fast.console import print_table

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        low, high = row["median_interval_s"]
        return (
            row["name"],
            images_of(row),
            f"{row['median_s'] * 1e3:.1f} ms ({low * 1e3:.1f} – {high * 1e3:.1f})",
            f"{row['images_per_s']:.1f}",
            f"{row['operations_per_image'] / 1e9:.2f} GFLOP",
            f"{row['operations_per_s'] / 1e9:.1f} GFLOP/s",
            "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['step_peak_bytes'] / 2**20:.0f} MiB",
        )

    columns = ("", "images", "step, median (99 %)", "images/s", "per image", "", "MFU", "memory per step")
    print_table("iwm-fast bench step", columns, [cells(row) for row in rows])


@app.command(epilog="Example: iwm-fast bench kernels --device cuda --json kernels.json")
def kernels(
    device: Device = None,
    repeats: Repeats = 30,
    only: Annotated[str | None, typer.Option("--only", metavar="OPERATION", help="Time one operation only.")] = None,
    json: Json = None,
) -> None:
    """Time each kernel against its baselines, after checking results against float64."""
    from iwm_fast.benchmarks.cases.kernel_cases import CASES
    from iwm_fast.benchmarks.kernels import measure

    ranks = only_rank(device, None)
    cases = [case for case in CASES if only in (None, case.operation)]
    if not cases:
        known = ", ".join(dict.fromkeys(case.operation for case in CASES))
        raise UserError(f"--only {only}: no such operation; choose from {known}")
    found = measure(cases, ranks.device, repeats, _progress if json == "-" else print)
    answer(json, "kernels", {key: value for key, value in found.items() if key != "schema"})


@app.command(epilog="Example: iwm-fast bench data --root photos/train --json data.json")
def data(
    json: Annotated[Path, typer.Option("--json", metavar="FILE", help="Write the result to this file.")],
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Read these images. Default: generate some.")
    ] = None,
    repeats: Repeats = 7,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per batch.")] = 64,
    size: Annotated[int, typer.Option("--size", min=16, help="Size of the views, pixels.")] = 224,
) -> None:
    """Time the data pipeline on one core and on all against Pillow and torchvision, after comparing their views."""
    from iwm_fast.benchmarks.data import main as measure

    words = ["--json", str(json), "--repeats", str(repeats), "--batch", str(batch), "--size", str(size)]
    measure([*words, *(["--root", str(root)] if root is not None else [])])


@app.command(epilog="Example: iwm-fast bench scaling --what batches,ranks --json scaling.json")
def scaling(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE...", help="Override keys of cpu-micro.")
    ] = None,
    what: Annotated[str, typer.Option("--what", help="Measure batches, ranks, or batches,ranks.")] = "batches,ranks",
    repeats: Repeats = 5,
    largest: Annotated[int, typer.Option("--largest", min=2, help="Largest batch of one rank; powers of two.")] = 512,
    json: Json = None,
) -> None:
    """Fit time and memory over the batch on one rank; measure weak and strong scaling on 1, 2 and 4 CPU ranks."""
    from iwm_fast.benchmarks.cases.presets import preset_config
    from iwm_fast.benchmarks.scaling import BATCHES, measure_batches, measure_ranks

    words = {word.strip() for word in what.split(",")}
    if words - {"batches", "ranks"}:
        raise UserError(f"--what {what}: give batches, ranks, or batches,ranks")
    config = preset_config("cpu-micro", tuple(overrides or ()))
    body: dict[str, Any] = {"rows": []}
    if "ranks" in words:
        body["rows"] += measure_ranks(config, repeats=repeats, say=_progress)
        if json not in (None, "-"):
            answer(json, "bench-scaling", body)  # a stopped run keeps the ranks' rows
    if "batches" in words:
        sizes = [size for size in BATCHES if size <= largest]
        found = measure_batches(config, only_rank("cpu", 1), sizes=sizes, repeats=repeats, say=_progress)
        body["rows"] += found["rows"]
        body["lines"] = found["lines"]
    answer(json, "bench-scaling", body, lambda: _print_scaling(body))


def _print_scaling(body: dict[str, Any]) -> None:
    from iwm_fast.console import print_table

    ranks = [row for row in body["rows"] if "ranks" in row]
    if ranks:
        rows = [
            (row["kind"], str(row["ranks"]), str(row["images"]), f"{row['median_s'] * 1e3:.1f} ms",
             f"{row['efficiency']:.0%}", f"{sum(row['collectives_a_step']['payload_bytes'].values()) / 2**20:.3f} MiB",
             f"{sum(row['expected_bytes'].values()) / 2**20:.3f} MiB",
             f"{row['collectives_a_step']['seconds'] * 1e3:.1f} ms")
            for row in ranks
        ]  # fmt: skip
        columns = ("scaling", "ranks", "images", "step", "efficiency", "counted", "by formula", "in collectives")
        print_table("iwm-fast bench scaling: one thread per rank", columns, rows)
    units = {"seconds": (1e3, "ms"), "cpu_seconds": (1e3, "ms of CPU"), "memory_bytes": (2**-20, "MiB")}
    for what, line in body.get("lines", {}).items():
        factor, unit = units[what]
        worst = max(map(abs, line["residuals"]))
        print(
            f"{what}: {line['intercept'] * factor:.3f} {unit} + {line['slope'] * factor:.4f} {unit} per image; "
            f"residuals {', '.join(f'{r:+.1%}' for r in line['residuals'])} (largest {worst:.1%})"
        )


@app.command(epilog="Example: iwm-fast bench compare before.json after.json")
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Result of another bench command.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Later result of the same command.")],
    at_least: Annotated[float, typer.Option("--at-least", min=0.0, help="Ignore smaller changes.")] = 0.03,
    json: Json = None,
) -> None:
    """Show ratios of medians, B over A, with 99 % intervals. The exit code is 1 if B is slower beyond the noise.

    For training runs, see iwm-fast compare.
    """
    from iwm_fast.benchmarks.compare import compare_files
    from iwm_fast.console import print_table

    found = compare_files(before, after, at_least)

    def show() -> None:
        columns = ("", "A", "B", "B / A", "99 % interval", "")
        rows = [
            (r["name"], f"{r['before_s'] * 1e3:.3f} ms", f"{r['after_s'] * 1e3:.3f} ms", f"{r['ratio']:.3f}",
             f"{r['low']:.3f} – {r['high']:.3f}", r["verdict"])
            for r in found["rows"]
        ]  # fmt: skip
        print_table("iwm-fast bench compare", columns, rows)
        for what, (old, new) in found["made_with"].items():
            print(f"made with another {what}: {old} → {new}")
        for which, names in (("A", found["only_before"]), ("B", found["only_after"])):
            if names:
                print(f"only in {which}: {', '.join(names)}")

    answer(json, "bench-compare", found, show)
    if any(row["verdict"] == "slower" for row in found["rows"]):
        raise typer.Exit(1)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
