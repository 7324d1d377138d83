"""Measure what grows with the number of images: the order of an epoch, and a rank's start from a manifest.

    python -m benchmarks.large_lists --images 1e6 1e8 1e9 --json FILE
    python -m benchmarks.large_lists --manifests 1e6 1e7 1e8 --out SCRATCH --json FILE

order: for each number of images, nanoseconds per sample and bytes that the order allocates (peak, by tracemalloc), in
batches of 4,096 from the middle of an epoch. For up to --sorted images also the seconds and bytes of the order that
earlier versions computed at the beginning of each epoch.

manifest: for each number of rows, in a scratch folder that is removed: a manifest of that many rows in 1,024 classes,
which lead to 64 images in a shard. index_s: seconds of the first opening, which reads all rows and writes the index.
Then, in new processes as ranks, the median of five: open_s; first_batch_s from the start of opening to the first batch
of a training (which opens DALI); row_us to read a row at a random place, from the disk where the file cache has dropped
it; private_mb: memory of this process alone that all of it took, 64 batches of 256 included, without the training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.data.order import FEISTEL, SORTED, SampleOrder
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.outputs import require_new_folder, require_result
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


_RANK = """
import json, sys, time
import numpy as np
from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.index import TINY
from iwm_fast.config.load import find_config, load_config
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.identity import identity_of, names_digest
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.order import SampleOrder
from iwm_fast.data.samples import FileStore, SampleReader
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
manifest = sys.argv[1]
before, began = private(), time.perf_counter()
images = list_images(manifest)
opened = time.perf_counter() - began
identity_of(images), names_digest(images)
known = time.perf_counter() - began
store = FileStore(images, 10**9)
store._keeps = False
reader = SampleReader(store, 0, BadSamples(len(images), 0.01))
order = SampleOrder(0, len(images))
for batch in range(64):
    reader.read(*order(batch * 256, batch * 256 + 256))
mine = private() - before
rows = np.random.default_rng(0).integers(0, len(images), 2000).tolist()
looked = time.perf_counter()
for row in rows:
    images.source_name(row)
row_us = (time.perf_counter() - looked) / len(rows) * 1e6
again = time.perf_counter()
config = load_config(find_config(TINY[0]), [*TINY[1:], "data.root=" + manifest, "data.threads=1"])
with TrainingStream(config, list_images(manifest), ActionSpace(config.actions.groups)) as stream:
    next(stream)
    first = time.perf_counter() - again
print(json.dumps({"open_s": opened, "sums_s": known - opened, "private_mb": mine, "row_us": row_us,
                  "first_batch_s": first}))
"""


def manifest_row(rows: int, scratch: Path) -> dict[str, Any]:
    """Measure a manifest of this many rows."""
    scratch.mkdir(parents=True)
    try:
        manifest = write_manifest(scratch, rows)
        opening = "import sys; from iwm_fast.data.image_list import list_images; list_images(sys.argv[1])"
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", opening, str(manifest)], check=True)
        row: dict[str, Any] = {
            "rows": rows,
            "index_s": time.perf_counter() - began,
            "text_bytes": manifest.stat().st_size,
        }
        row["index_bytes"] = sum(file.stat().st_size for file in scratch.glob(".*.rows"))
        ranks = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", _RANK, str(manifest)], stdout=subprocess.PIPE, text=True, check=True
                ).stdout.splitlines()[-1]
            )
            for _ in range(REPEATS)
        ]
        for key in ranks[0]:
            row[key] = median(rank[key] for rank in ranks)
        row["first_batch_s_each"] = [rank["first_batch_s"] for rank in ranks]
        return row
    finally:
        shutil.rmtree(scratch)


def write_manifest(folder: Path, rows: int) -> Path:
    """Write a shard of 64 images and a manifest whose rows lead to them in turn."""
    ends, rng = [], np.random.default_rng(0)
    with tarfile.open(folder / "a.tar", "w") as shard:
        for number in range(64):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
            raw, entry = buffer.getvalue(), tarfile.TarInfo(f"{number}.jpg")
            entry.size = len(raw)
            ends.append(f"{len(raw)}\t32\t32\t{{}}\t{crc32c(raw):08x}\ta.tar\t{shard.offset + 512}\t1\n")
            shard.addfile(entry, io.BytesIO(raw))
    manifest = folder / "a.tsv"
    names = [f"c{label:04d}" for label in range(1024)]
    header = f"#iwm-fast-manifest/1\tsource=webdataset\troot=.\tsamples={rows}\tclasses={json.dumps(names)}\tcheck=1\n"
    columns = "path\tbytes\twidth\theight\tlabel\tcrc32c\tfile\toffset\tcheck\n"
    with manifest.open("w") as file:
        file.write(header + columns)
        for first in range(0, rows, 65536):
            part = range(first, min(first + 65536, rows))
            label = names[first // 65536 % 1024]
            tails = [end.format(label) for end in ends]
            file.write("".join([f"a.tar:{label}/{row:09d}.jpg\t{tails[row % 64]}" for row in part]))
    return manifest


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, nargs="+", default=[], help="lengths of an epoch")
    parser.add_argument("--sorted", type=float, default=1e7, help="most images to measure the earlier order for")
    parser.add_argument("--manifests", type=float, nargs="+", default=[], help="rows of a manifest")
    parser.add_argument("--out", type=Path, metavar="SCRATCH", help="folder to create for manifests; 85 B per row")
    parser.add_argument("--json", required=True, metavar="FILE")
    given = parser.parse_args()
    require_result(given.json)
    if given.manifests and given.out is None:
        parser.error("--manifests needs --out")
    if given.out is not None:
        require_new_folder(given.out)
    results: dict[str, Any] = {"load_before": os.getloadavg()[0], "order": [], "manifest": []}
    for images in map(int, given.images):
        row = order_row(images, earlier=images <= given.sorted)
        earlier = f"; sorted {row['sorted_s']:.1f} s, {row['sorted_bytes'] / 1e6:.0f} MB" if "sorted_s" in row else ""
        print(
            f"order of {images:,}: {row['feistel_ns']:.0f} ns per sample, {row['feistel_bytes'] / 1e6:.1f} MB{earlier}",
            flush=True,
        )
        results["order"].append(row)
    for rows in map(int, given.manifests):
        row = manifest_row(rows, given.out)
        print(
            f"manifest of {rows:,}: index {row['index_s']:.1f} s, {row['index_bytes'] / 1e6:.1f} MB; open "
            f"{row['open_s'] * 1e3:.0f} ms; first batch {row['first_batch_s']:.1f} s "
            f"(at most {max(row['first_batch_s_each']):.1f}); {row['row_us']:.0f} us per row; "
            f"private {row['private_mb']:.0f} MB",
            flush=True,
        )
        results["manifest"].append(row)
    write_result(given.json, "benchmark-large-lists", results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.large_lists", main))
