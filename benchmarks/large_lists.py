"""Measure what grows with the number of images: the order of an epoch.

    python -m benchmarks.large_lists --images 1e6 1e8 1e9 --json FILE

order: for each number of images, in a process of its own: nanoseconds per sample and bytes that the order allocates
(peak, by tracemalloc), in batches of 4,096 from the middle of an epoch. For up to --sorted images also the seconds and
bytes of the order that earlier versions computed at the beginning of each epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import tracemalloc
from statistics import median
from typing import Any

from iwm_fast.data.order import FEISTEL, SORTED, SampleOrder
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

BATCH, BATCHES, REPEATS = 4096, 64, 5


def order_row(images: int, *, earlier: bool) -> dict[str, Any]:
    """Measure the order of an epoch of this many images."""
    row: dict[str, Any] = {"images": images, "feistel_ns": [], "feistel_bytes": peak(images, FEISTEL)}
    for _ in range(REPEATS):
        order = SampleOrder(0, images, FEISTEL)
        began, middle = time.perf_counter(), images // 2
        for batch in range(BATCHES):
            order(middle + batch * BATCH, middle + (batch + 1) * BATCH)
        row["feistel_ns"].append((time.perf_counter() - began) / BATCHES / BATCH * 1e9)
    row["feistel_ns"] = median(row["feistel_ns"])
    if earlier:
        row["sorted_bytes"] = peak(images, SORTED)
        began = time.perf_counter()
        SampleOrder(0, images, SORTED)(0, BATCH)
        row["sorted_s"] = time.perf_counter() - began
    return row


def peak(images: int, kind: str) -> int:
    """Return the most bytes that an order holds at a time while it gives four batches."""
    tracemalloc.start()
    order = SampleOrder(0, images, kind)
    for batch in range(4):
        order(batch * BATCH, (batch + 1) * BATCH)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, nargs="+", default=[1e6, 1e8, 1e9])
    parser.add_argument("--sorted", type=float, default=1e7, help="most images to measure the earlier order for")
    parser.add_argument("--json", required=True, metavar="FILE")
    given = parser.parse_args()
    require_result(given.json)
    results: dict[str, Any] = {"load_before": os.getloadavg()[0], "order": []}
    for images in map(int, given.images):
        row = order_row(images, earlier=images <= given.sorted)
        earlier = f"; sorted {row['sorted_s']:.1f} s, {row['sorted_bytes'] / 1e6:.0f} MB" if "sorted_s" in row else ""
        print(
            f"order of {images:,}: {row['feistel_ns']:.0f} ns per sample, {row['feistel_bytes'] / 1e6:.1f} MB{earlier}",
            flush=True,
        )
        results["order"].append(row)
    write_result(given.json, "benchmark-large-lists", results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.large_lists", main))
