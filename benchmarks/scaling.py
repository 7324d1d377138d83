"""Scaling of time, memory and communication, with the batch on one rank and with the ranks on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.step import Trainer
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.memory import peak_of
from iwm_fast.measure.stats import median_of
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.measure.timing import clocked

__all__ = ["BATCHES", "fit_line", "measure_batches", "measure_ranks"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LIMIT_S = 600.0


def _with(config: Config, **train: Any) -> Config:
    """Return a configuration with other keys of `train`, and with no logged step among the timed ones."""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "log": config.log.model_copy(update={"every_steps": 10**9}),
        }
    )


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Fit y ≈ intercept + slope · x by least squares of relative errors; return both, and residuals as shares of y.

    Weighted by 1 / y: sizes differ five-hundredfold, and the largest alone would decide an unweighted fit.
    """
    sizes, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / values[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones_like(values), rcond=None)
    residuals = values / (intercept + slope * sizes) - 1
    return {"slope": float(slope), "intercept": float(intercept), "residuals": residuals.tolist()}


def measure_batches(
    config: Config, ranks: Ranks, *, sizes: Sequence[int] = BATCHES, repeats: int = 5, say: Callable[[str], object]
) -> dict[str, Any]:
    """Return time and memory of a step by number of images, each with the line fitted through them.

    Memory is the peak of building and stepping above what was allocated before. Weights and optimizer are included:
    they are the intercept.
    """
    rows: list[dict[str, Any]] = []
    space = space_of(config.actions)
    # Excludes what a process loads and allocates once, whatever the batch.
    first = _with(config, global_batch=1)
    prepare_trainer(first, space, synthetic_stream(first, space, ranks.device, steps=1), ranks).train_step()
    for size in sizes:
        one = _with(config, global_batch=size)
        held: list[Trainer] = []

        def build(one: Config = one, held: list[Trainer] = held) -> None:
            stream = synthetic_stream(one, space, ranks.device, steps=1)
            held.append(prepare_trainer(one, space, stream, ranks))
            for _ in range(2):
                held[0].train_step()

        memory = peak_of(build, ranks.device)
        taken = [clocked(held[0].train_step, ranks.device) for _ in range(repeats)]
        seconds = [t.seconds for t in taken]
        rows.append(
            {
                "name": f"batch {size}",
                "images": size,
                "sources_per_target": config.views.sources_per_target,
                "seconds": seconds,
                "cpu_seconds": [t.cpu_seconds for t in taken],
                "median_s": median_of(seconds).value,
                "memory_bytes": memory,
            }
        )
        say(f"{size} images: {rows[-1]['median_s'] * 1e3:.1f} ms, {memory / 2**20:.0f} MiB")
    images = [row["images"] for row in rows]
    lines = {
        "seconds": fit_line(images, [row["median_s"] for row in rows]),
        "cpu_seconds": fit_line(images, [median_of(row["cpu_seconds"]).value for row in rows]),
        "memory_bytes": fit_line(images, [row["memory_bytes"] for row in rows]),
    }
    return {"rows": rows, "lines": lines}


def measure_ranks(
    config: Config, *, worlds: Sequence[int] = (1, 2, 4), kinds: Sequence[str] = ("weak", "strong"), repeats: int = 5,
    say: Callable[[str], object],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return step time and communication on this many ranks, with one thread each, on this machine's CPU.

    Weak scaling: each rank has the configuration's batch. Strong: all worlds have the global batch of the largest.
    """
    rows = []
    batch = config.train.global_batch
    for kind in kinds:
        for world in worlds:
            images = batch * world if kind == "weak" else batch * max(worlds)
            row = _launch(_with(config, global_batch=images), world, repeats)
            row |= {"name": f"{kind} {world}", "kind": kind, "median_s": median_of(row["seconds"]).value}
            rows.append(row)
            said = row["collectives_a_step"]
            say(
                f"{kind}, {world} rank(s), {images} images: {row['median_s'] * 1e3:.1f} ms, "
                f"{sum(said['payload_bytes'].values()) / 2**20:.2f} MiB in {said['seconds'] * 1e3:.1f} ms"
            )
    for row in rows:
        first = next(one for one in rows if one["kind"] == row["kind"])
        ideal = first["median_s"] if row["kind"] == "weak" else first["median_s"] * first["ranks"] / row["ranks"]
        row["efficiency"] = ideal / row["median_s"]
    return rows


def _launch(config: Config, world: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "config.json", Path(folder) / "row.json"
        given.write_text(json.dumps(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command += ["-m", "iwm_fast.benchmarks.ranks", str(given), str(out), str(repeats)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{world} ranks: exit code {done.returncode}: {done.stderr[:6000]}")
        row: dict[str, Any] = json.loads(out.read_text())
        return row
