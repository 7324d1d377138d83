"""What a rank's start from a manifest takes, measured in new processes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.errors import UserError

__all__ = ["measure_manifest"]

_REPEATS = 5
_ROW_BYTES = 90  # of the text, its index and its shard

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
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024
manifest = sys.argv[1]
before, began = private(), time.perf_counter()
images = list_images(manifest)
opened = time.perf_counter() - began
identity_of(images), names_digest(images)
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
row_s = (time.perf_counter() - looked) / len(rows)
again = time.perf_counter()
config = load_config(find_config(TINY[0]), [*TINY[1:], "data.root=" + manifest, "data.threads=1"])
with TrainingStream(config, list_images(manifest), ActionSpace(config.actions.groups)) as stream:
    next(stream)
    first = time.perf_counter() - again
print(json.dumps({"open_s": opened, "private_bytes": mine, "row_s": row_s,
                  "first_batch_s": first}))
"""


def measure_manifest(rows: int, scratch: Path) -> dict[str, Any]:
    """Measure a manifest of this many rows in a new folder, which is removed. Its 1,024 classes lead to 64 images.

    manifest_index_s: seconds of the first opening, which reads all rows and writes the index. The others are medians of
    five ranks: open_s; first_batch_s from the start of opening to the first batch of a training, which opens DALI;
    row_s to read a row at a random place, from the disk where the file cache has dropped it; private_bytes, memory of
    the process alone that all of it took, 64 batches of 256 included, without the training. Raises UserError where the
    disk has no room.
    """
    free = shutil.disk_usage(scratch.parent).free
    if free < _ROW_BYTES * rows:
        raise UserError(
            f"{scratch}: a manifest of {rows:,} rows takes {_ROW_BYTES * rows / 1e9:.2g} GB and {free / 1e9:.2g} GB "
            "are free; free space, name another --out, or fewer --images"
        )
    scratch.mkdir()
    try:
        manifest = _write_manifest(scratch, rows)
        opening = "import sys; from iwm_fast.data.image_list import list_images; list_images(sys.argv[1])"
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", opening, str(manifest)], check=True)
        row: dict[str, Any] = {
            "manifest_index_s": time.perf_counter() - began,
            "manifest_text_bytes": manifest.stat().st_size,
            "manifest_index_bytes": sum(file.stat().st_size for file in scratch.glob(".*.rows")),
        }
        ranks = [_rank(manifest) for _ in range(_REPEATS)]
        row |= {key: median(rank[key] for rank in ranks) for key in ranks[0]}
        return row | {"first_batch_s_slowest": max(rank["first_batch_s"] for rank in ranks)}
    finally:
        shutil.rmtree(scratch)


def _rank(manifest: Path) -> dict[str, float]:
    command = [sys.executable, "-c", _RANK, str(manifest)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _write_manifest(folder: Path, rows: int) -> Path:
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
