"""`iwm-fast profile`: time of a training step by part."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from iwm_fast.cli.completion import config_files
from iwm_fast.cli.options import CONFIG_HELP, Device, Json, Overrides, Threads, answer
from iwm_fast.measure.device import only_rank

__all__ = ["profile"]


def profile(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, autocompletion=config_files)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Write trace, tables and plot to this folder.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps, and as many timed by part.")] = 10,
    device: Device = None,
    threads: Threads = None,
    ncu: Annotated[
        str | None,
        typer.Option(
            "--ncu",
            metavar="KERNEL",
            help="Print the Nsight Compute command for a Triton function; any other word lists the functions.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Profile some steps; write trace.json (Perfetto, chrome://tracing), profile.md, step.png and memory.json.

    Images come from data.root; if it is not set, pixels are random.
    """
    from iwm_fast.config.load import find_config, load_config

    loaded = load_config(find_config(config), overrides or [])
    from iwm_fast.measure.profile import ncu_command
    from iwm_fast.measure.profile import profile as run

    if ncu is not None:
        print(ncu_command(ncu, config, overrides or [], out))
        return
    ranks = only_rank(device, threads)
    root = Path(loaded.data.root) if loaded.data.root else None

    def keep(found: dict[str, Any]) -> None:
        answer(str(out / "profile.json"), "profile", found)
        answer(json, "profile", found, lambda: _show(found))

    say = partial(print, file=sys.stderr, flush=True)
    run(loaded, out, ranks, root=root, steps=steps, say=say, keep=keep)
    if json != "-":
        print(f"{out}: trace.json, profile.md, step.png, memory.json, profile.json")


def _show(found: dict[str, Any]) -> None:
    from iwm_fast.console import print_table

    step = found["parts_step_s"]
    rows = [(name, f"{s * 1e3:.2f} ms", f"{s / step:.1%}") for name, s in found["parts_s"].items()]
    rows.append(("all parts", f"{found['parts_sum_s'] * 1e3:.2f} ms", f"{found['parts_sum_s'] / step:.1%}"))
    rows.append(("that step", f"{step * 1e3:.2f} ms", ""))
    free, sources = found["step_s"], found["sources_per_target"]
    each = f", {sources} sources each" if sources > 1 else ""
    rows.append(("step, median", f"{free * 1e3:.2f} ms", f"{found['images'] / free:.1f} images/s{each}"))
    print_table("iwm-fast profile", ("part", "", "of the step"), rows)
