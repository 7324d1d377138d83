"""Time the data pipeline in images per second, on one core and on all, against torchvision and Pillow, and by stage.

    python -m benchmarks.data --json FILE [--root FOLDER] [--short-side 256] [--repeats 7] [--batches 6] [--batch 64]
                              [--device cpu|gpu]

Every implementation makes the same two views of the same files from the same parameters. iwm-fast also checks each
file's header, samples parameters and masks, and encodes actions; it reads the files both from the folder and from
WebDataset shards. Implementations are timed in turn, repeat by repeat.

One core: the process is pinned to one core, with one thread per library, and rates are per CPU second, which other load
on the machine barely moves (wall-clock seconds are recorded too). All cores: DALI's threads against as many workers of
PyTorch's DataLoader, per wall-clock second.

A folder with too few images is read several times, each time as if its files were new. Without a folder, 500 × 375
JPEGs are generated; --short-side scales either down. All views are compared before anything is timed.
Plot the result with `benchmarks.plots.data`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.baselines.kernels import Skipped
from iwm_fast.benchmarks.baselines.views import Render, batches, pillow_views, torchvision_functions, torchvision_views
from iwm_fast.benchmarks.parts.data_job import WARM_UP, Job
from iwm_fast.benchmarks.parts.data_stages import stages
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.sources.kinds import is_image
from iwm_fast.environment import environment, installed_version, usable_cores
from iwm_fast.measure.timing import spread
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

__all__ = ["SCHEMA", "measure"]

SCHEMA = "iwm-fast-data/1"
OURS, SHARDS, PILLOW, TORCHVISION = "iwm-fast", "iwm-fast shards", "pillow", "torchvision"
# Mean absolute difference in levels, of 255. Pillow blurs with boxes; where torchvision's formula differs, views
# without that transformation are compared.
_WRONG = 2.0
_CHECKED = 48


def _ours(job: Job, root: Path, repeat: int, threads: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
    config = job.config(threads)
    return TrainingStream(config, list_images(root), ActionSpace(), start=repeat * job.images)


def _other(render: Render, job: Job, repeat: int, workers: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
    return contextlib.nullcontext(batches(render, *job.drawn(repeat), job.size, job.batch, workers))


def _contenders(say: Callable[[str], object]) -> dict[str, Render | None]:
    """Implementations by name; None is iwm-fast."""
    found: dict[str, Render | None] = {OURS: None, SHARDS: None, PILLOW: pillow_views}
    try:
        torchvision_functions()
        found[TORCHVISION] = torchvision_views
    except Skipped as reason:
        say(f"torchvision: skipped: {reason}")
    return found


def _timed(job: Job, name: str, render: Render | None, repeat: int, cores: int) -> tuple[float, float]:
    """Return wall-clock seconds and CPU seconds of this process for the timed batches."""
    if render is None:
        made = _ours(job, job.shards if name == SHARDS else job.root, repeat, cores)
    else:
        made = _other(render, job, repeat, cores if cores > 1 else 0)
    with made as stream:
        for _ in range(WARM_UP):
            next(stream)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(job.count):
            batch = next(stream)
        if job.device == "gpu" and render is None:
            torch.cuda.synchronize(batch.source.device)
        return time.perf_counter() - wall, time.process_time() - cpu


def errors(job: Job, contenders: dict[str, Render | None]) -> dict[str, float]:
    """Mean absolute difference in levels from iwm-fast's views, by implementation, on a repeat's first images."""
    paths, views = job.drawn(0)
    with _ours(job, job.root, 0, 1) as stream:
        batch = next(iter(stream))
    count = min(_CHECKED, job.batch)
    ours = [
        [tensor[row].cpu().numpy().astype(float) for tensor in (batch.source, batch.target)] for row in range(count)
    ]
    found = {}
    for name, render in contenders.items():
        if render is None:
            continue
        differences = []
        for row in range(count):
            pair = render(paths[row], views, row, job.size)
            jittered = (views.source.hue[row] != 0, views.target.hue[row] != 0)
            for mine, other, other_formula in zip(ours[row], pair, jittered, strict=True):
                if name != TORCHVISION or not other_formula:
                    differences.append(float(np.abs(mine - other).mean()))
        found[name] = float(np.mean(differences))
    return found


@contextlib.contextmanager
def held(cores: set[int]) -> Iterator[None]:
    """Pin the process and its children to these cores."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def measure(job: Job, repeats: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Return the document's rows, ratios and stages. Raise RuntimeError if an implementation's views are wrong."""
    contenders = _contenders(say)
    wrong = errors(job, contenders)
    say("difference from iwm-fast in levels: " + ", ".join(f"{name} {value:.2f}" for name, value in wrong.items()))
    if wrong and max(wrong.values()) > _WRONG:
        raise RuntimeError(f"the implementations make different views (levels: {wrong}); nothing was timed")
    every = sorted(os.sched_getaffinity(0))
    rows = []
    for cores in dict.fromkeys((1, len(every))):
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        with held(set(every[:cores])):
            for repeat in range(repeats):
                for name, render in contenders.items():
                    taken[name].append(_timed(job, name, render, repeat, cores))
        for name, pairs in taken.items():
            rows.append(_row(job, name, cores, pairs))
            say(_line(rows[-1]))
    ratios = [_ratio(ours, row) for ours in rows for row in rows if _comparable(ours, row)]
    for ratio in ratios:
        spreads = f"{ratio['p50']:.2f} × ({ratio['p20']:.2f} – {ratio['p80']:.2f})"
        say(f"{ratio['against']:12} {ratio['cores']} core(s): {spreads}")
    with held(set(every[:1])):
        costs = stages(job, repeats)
    for cost in costs:
        say(f"  {cost['stage']:32} {1e3 * cost['p50']:7.3f} ms")
    return {
        "schema": SCHEMA,
        "job": {"images": job.batch * job.count, "batch": job.batch, "size": job.size, "device": job.device},
        "versions": {"torchvision": installed_version("torchvision"), "pillow": installed_version("pillow")},
        "load": os.getloadavg(),
        "errors": wrong,
        "rows": rows,
        "ratios": ratios,
        "stages": costs,
    }


def _row(job: Job, name: str, cores: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Rate by cpu_seconds, which are of one process only, where one core does all the work; else by wall clock."""
    images = job.batch * job.count
    seconds, cpu = zip(*pairs, strict=True)
    by = "cpu" if cores == 1 and job.device == "cpu" else "clock"
    rates = [images / taken for taken in (cpu if by == "cpu" else seconds)]
    row = {"contender": name, "source": "shards" if name == SHARDS else "folder", "cores": cores, "by": by}
    return row | {"seconds": seconds, "cpu_seconds": cpu, "images_per_s": rates, **spread(rates)}


def _comparable(ours: dict[str, Any], row: dict[str, Any]) -> bool:
    return bool(ours["contender"] == OURS != row["contender"] and ours["cores"] == row["cores"])


def _ratio(ours: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Ratios of paired repeats."""
    ratios = [mine / other for mine, other in zip(ours["images_per_s"], row["images_per_s"], strict=True)]
    return {"against": row["contender"], "cores": row["cores"], "by": row["by"], **spread(ratios)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['contender']:12} {row['cores']} core(s) {row['p50']:7.1f} images/s "
        f"({row['p20']:.1f} – {row['p80']:.1f}) by {row['by']}"
    )


def _made(folder: Path, count: int = 64) -> None:
    """Generate 500 × 375 JPEGs of quality 90 with smooth colours, edges and grain."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:375, 0:500] / 500
    for number in range(count):
        angles, rates = random.uniform(0, 6, 3), random.uniform(5, 40, 3)
        waves = [np.sin(r * (x * np.cos(a) + y * np.sin(a)) + a) for a, r in zip(angles, rates, strict=True)]
        image = 127 + 90 * np.stack(waves, axis=2) + random.normal(0, 8, (375, 500, 3))
        left, top = random.integers(0, 250, 2)
        image[top : top + 120, left : left + 160] = random.uniform(0, 255, 3)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)


def _smaller(given: Path, folder: Path, short_side: int) -> Path:
    """Save the images of `given` into `folder` as JPEGs of quality 90, their shorter side `short_side` pixels."""
    for file in sorted(file for file in given.iterdir() if is_image(file.name)):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        scale = short_side / min(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        image.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{file.stem}.jpg", quality=90)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="folder of upright RGB images; default: generate them")
    parser.add_argument("--short-side", type=int, help="shorter side of the images, pixels; default: unchanged")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=6, help="timed batches per repeat")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    require_result(args.json)
    with (
        tempfile.TemporaryDirectory() as made,
        tempfile.TemporaryDirectory() as out,
        tempfile.TemporaryDirectory() as s,
    ):
        if args.root is None:
            _made(Path(made))
        images = args.root or Path(made)
        job = Job.of(
            images if args.short_side is None else _smaller(images, Path(s), args.short_side),
            Path(out),
            size=args.size,
            batch=args.batch,
            count=args.batches,
            device=args.device,
        )
        say = partial(print, file=sys.stderr if str(args.json) == "-" else sys.stdout, flush=True)
        say(f"{usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
        document = measure(job, args.repeats, say)
    document |= {"images_from": "made" if args.root is None else "given", "short_side": args.short_side}
    document |= {"median_size": np.median(job.sizes, axis=0).tolist(), "environment": environment()}
    write_json(args.json, document, indent=None)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.data", main))
