"""Time `iwm-fast data index` on many small files, and the start of a training with and without the manifest.

    python -m benchmarks.index --out SCRATCH --files 100000 --json FILE

Generates the files in SCRATCH (JPEGs of 32 × 32 pixels in ten class folders), indexes them, opens folder and manifest,
trains two steps from each, and removes everything. The files were just written, so they are in the page cache. Elapsed
times include other load on the machine; the load average is recorded beside them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources import open_source
from iwm_fast.outputs import require_new_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

REPEATS = 3
TINY = (
    "vit_tiny_p4_32.yaml",
    "model.encoder={depth: 1, width: 16, heads: 2}",
    "model.predictor.depth=1",
    "model.predictor.width=16",
    "model.predictor.heads=2",
    "train.global_batch=8",
    "log.every_steps=1",
    "log.tensorboard=false",
)


def draw(root: Path, files: int) -> None:
    """Write `files` different JPEGs, a thousand per folder."""
    rng = np.random.default_rng(0)
    for number in range(files):
        folder = root / f"class{number // 1000 % 10}" / f"{number // 1000:05d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((32, 32)).save(buffer, "JPEG")
        (folder / f"{number:08d}.jpg").write_bytes(buffer.getvalue())


def timed(work: Any) -> dict[str, float]:
    """Return the medians of elapsed seconds and of this process's CPU seconds."""
    elapsed, own = [], []
    for _ in range(REPEATS):
        began, began_own = time.perf_counter(), time.process_time()
        work()
        elapsed.append(time.perf_counter() - began)
        own.append(time.process_time() - began_own)
    return {"seconds": median(elapsed), "cpu_seconds": median(own)}


def command(*words: str) -> dict[str, float]:
    """Return elapsed and CPU seconds of an iwm-fast command, child processes included."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "iwm_fast", *words], check=True)
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return {"seconds": after.elapsed - before.elapsed, "cpu_seconds": used}


def first_step(root: Path, run: Path) -> float:
    """Return seconds from the start of `pretrain` to the end of its first step."""
    shutil.rmtree(run, ignore_errors=True)
    command("pretrain", *TINY, "train.schedule_steps=2", f"data.root={root}", "--out", str(run))
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["first_step_after_s"])


def main() -> None:
    """Generate, index, open, train, remove, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="SCRATCH", help="folder to create")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--json", required=True, metavar="FILE")
    given = parser.parse_args()
    require_result(given.json)
    require_new_folder(given.out)
    given.out.mkdir(parents=True)
    try:
        images, manifest = given.out / "images", given.out / "manifest.tsv"
        draw(images, given.files)
        load = os.getloadavg()[0]
        indexed = command("data", "index", str(images), "--out", str(manifest))
        results = {
            "files": given.files,
            "load_before": load,
            "index": indexed,
            "open_manifest": timed(lambda: list_images(manifest)),
            "list_folder": timed(lambda: open_source(images)),
            "first_step_after_s": {
                "manifest": first_step(manifest, given.out / "run"),
                "folder": first_step(images, given.out / "run"),
            },
            "manifest_bytes": manifest.stat().st_size,
        }
    finally:
        shutil.rmtree(given.out)
    write_result(given.json, "benchmark-index", results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.index", main))
