"""How calls, bytes, memory and seconds of the control plane grow with ranks and images, on simulated ranks.

``python -m benchmarks.scale --ranks 64 256 1024 --images 1e6 1e8 --out SCRATCH --json FILE`` also draws a picture on
logarithmic axes beside FILE, with the exponent fitted to each line. Columns of images: seconds and bytes of the order
of an epoch; with --out also a rank's start from a manifest (`parts.manifest_ranks`).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from iwm_fast.benchmarks.parts.manifest_ranks import measure_manifest
from iwm_fast.benchmarks.parts.scale_picture import draw_scale
from iwm_fast.benchmarks.simulated_ranks.control_plane import measure_index, measure_look, measure_meeting
from iwm_fast.benchmarks.simulated_ranks.simulated import state_shapes
from iwm_fast.benchmarks.sweep import public
from iwm_fast.config import load_config, packaged_config
from iwm_fast.data.order import SampleOrder
from iwm_fast.outputs import require_new_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

_SOCKETS = """
import json, sys
from iwm_fast.benchmarks.simulated_ranks.sockets import sockets_of
print(json.dumps(sockets_of(int(sys.argv[1]))))
"""
_BATCH, _BATCHES, _REPEATS = 4096, 64, 5


def main(words: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024], help="numbers of simulated ranks")
    parser.add_argument("--images", type=float, nargs="*", default=[1e6, 1e8], help="numbers of images")
    parser.add_argument(
        "--out", type=Path, metavar="SCRATCH", help="folder to create for manifests of so many images; 90 B per image"
    )
    parser.add_argument("--processes", type=int, nargs="*", default=[8, 16, 32], help="processes that count sockets")
    parser.add_argument("--json", required=True, help="file to write; the picture is beside it")
    asked = parser.parse_args(words)
    require_result(asked.json)
    if asked.out is not None:
        require_new_folder(asked.out)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
    if min(asked.ranks) < 16:
        parser.error(f"--ranks: {min(asked.ranks)} is too few; simulate 16 or more, two hosts of eight")
    result = {
        "ranks": [_of_ranks(world) for world in asked.ranks],
        "images": [_of_images(int(count), asked.out) for count in asked.images],
        "sockets": [_of_processes(world) for world in asked.processes],
    }
    exponents = {
        place: _exponents(rows, rows[0].keys() - {key})
        for place, key in (("ranks", "ranks"), ("images", "images"), ("sockets", "processes"))
        for rows in [[{"size": row[key], **row} for row in result[place]]]
        if len(rows) > 1
    }
    for place, found in exponents.items():
        for name, exponent in sorted(found.items()):
            print(f"{place}: {name} grows as n^{exponent:.2f}", flush=True)
    command = public(list(sys.argv[1:] if words is None else words))
    write_result(asked.json, "scale", result | {"exponents": exponents, "command": command})
    if asked.json != "-":
        draw_scale(result, exponents, Path(asked.json).with_suffix(".png"))
    return 0


def _of_ranks(world: int) -> dict[str, Any]:
    shapes = state_shapes(load_config(packaged_config("vit_large_p16_224.yaml")))
    parts: dict[str, dict[str, Any]] = {"meeting": measure_meeting(world), "look": measure_look(world)}
    parts |= {f"index_stage_{stage}": measure_index(shapes, world, stage) for stage in (1, 3)}
    row = {"ranks": world} | {f"{part}_{k}": v for part, found in parts.items() for k, v in found.items()}
    print(
        f"{world} ranks: meeting {row['meeting_most_calls_of_a_rank']} calls per rank, look "
        f"{row['look_most_calls_of_a_rank']}; index {row['index_stage_3_index_bytes']:,} bytes at stage 3, "
        f"{row['index_stage_3_most_bytes_sent_by_a_rank']:,} sent by a rank",
        flush=True,
    )
    return row


def _of_images(count: int, scratch: Path | None) -> dict[str, Any]:
    """Time and memory of the order of an epoch from its middle on, and of a rank's start from a manifest."""
    tracemalloc.start()
    begin = time.perf_counter()
    order = SampleOrder(0, count)
    order(count // 2, count // 2 + _BATCH)
    first = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = median(_order_seconds(order, count) for _ in range(_REPEATS))
    row = {"images": count, "order_first_s": first, "order_s_per_sample": seconds, "order_peak_bytes": peak}
    print(f"{count:,} images: order {seconds * 1e9:.0f} ns per sample, {peak:,} bytes", flush=True)
    if scratch is not None:
        row |= measure_manifest(count, scratch)
        print(
            f"{count:,} images: reading a manifest once {row['manifest_index_s']:.1f} s; then open "
            f"{row['open_s'] * 1e3:.0f} ms, first batch {row['first_batch_s']:.1f} s (slowest "
            f"{row['first_batch_s_slowest']:.1f}), {row['row_s'] * 1e6:.0f} us per row, private "
            f"{row['private_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
    return row


def _order_seconds(order: SampleOrder, count: int) -> float:
    """Seconds per sample of 64 batches."""
    begin, middle = time.perf_counter(), count // 2
    for batch in range(_BATCHES):
        order(middle + batch * _BATCH, middle + (batch + 1) * _BATCH)
    return (time.perf_counter() - begin) / _BATCHES / _BATCH


def _of_processes(world: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _SOCKETS, str(world)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{world} processes: {done.stderr[-2000:]}")
    first, *others = [sum(counts.values()) for counts in json.loads(done.stdout.splitlines()[-1])]
    print(f"{world} processes: {max(others)} sockets per process, {first} of the first rank", flush=True)
    return {"processes": world, "sockets_per_process": max(others), "sockets_of_the_first": first}


def _exponents(rows: list[dict[str, Any]], names: set[str]) -> dict[str, float]:
    """Return b of a · n^b for each measured name, by least squares of logarithms."""
    found: dict[str, float] = {}
    for name in names - {"size"}:
        values = [row[name] for row in rows]
        if all(isinstance(value, int | float) and value > 0 for value in values):
            sizes = [math.log(row["size"]) for row in rows]
            found[name] = float(np.polyfit(sizes, [math.log(value) for value in values], 1)[0])
    return found


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.scale", main))
