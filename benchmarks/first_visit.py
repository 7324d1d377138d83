"""Measure the data thread's CPU time per image on its first visit, by who checks the image.

    python -m benchmarks.first_visit --json FILE [--before CHECKOUT] [--root FOLDER] [--files 4096] [--rounds 5]

Reads the images of FOLDER, or generated JPEGs of 100 KB with an EXIF block, once each in batches of 64 through
training's reader. They are checked by the data thread, by two processes (data.checkers=2), by four threads
(data.readers=4), or not at all, because a manifest of `iwm-fast data index --check` has the verdicts. A second visit
checks nothing, so the difference of the two is the check. --before adds the same measurement with the code of another
checkout, one without data.checkers. Every measurement is a process of its own; variants are timed in turn, round by
round.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.data.checkers import modules_path
from iwm_fast.data.sources.kinds import MANIFEST_FILE
from iwm_fast.data.tools.index import write_index
from iwm_fast.measure.timing import spread
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["main", "measure"]

BEFORE, OURS = "before, checked by the data thread", "checked by the data thread"
# name: (keyword arguments of FileStore, whether it reads the checked manifest)
VARIANTS: dict[str, tuple[dict[str, int], bool]] = {
    OURS: ({}, False),
    "checked by 2 processes": ({"checkers": 2}, False),
    "checked by 4 threads": ({"readers": 4}, False),
    "checked by 2 processes, read by 4 threads": ({"checkers": 2, "readers": 4}, False),
    "verdicts from the manifest": ({}, True),
}
_WARM = 64  # images of a separate folder, read first: they trigger lazy imports and allocations

# Names that every version has, so that another checkout's code runs too.
_CHILD = """
import json, sys, time
import numpy as np
from iwm_fast.data import samples
from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.data.image_list import list_images
samples.KEPT_BYTES = 0
def visit(root, keywords):
    images = list_images(root)
    store = samples.FileStore(images, 10**9, **keywords)
    reader = samples.SampleReader(store, 0, BadSamples(len(images), 1.0))
    batches = np.array_split(np.random.default_rng(0).permutation(len(images)), max(1, len(images) // 64))
    found = []
    for visited in range(2):
        own = everything = 0.0
        for place, ids in enumerate(batches):
            thread, process = time.thread_time(), time.process_time()
            if "checkers" in keywords:
                for coming in batches[place + 2 * bool(place) : place + 3]:  # each once, two ahead, as training does
                    reader.expect(coming)
            reader.read(ids, np.zeros_like(ids))
            own += time.thread_time() - thread
            everything += time.process_time() - process
        found.append([own / len(images), everything / len(images)])
    store.close()
    return found
warm, root, keywords = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
visit(warm, {})
print(json.dumps(visit(root, keywords)))
"""


def _draw(folder: Path, count: int, first: int = 0) -> None:
    """Write JPEGs of about 100 KB, 500 × 375 pixels; one in sixteen is unique, the others are copies."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:375, 0:500]
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0112], exif[0x0132] = "Maker", "Model", 1, "2026:01:01 12:00:00"
    raws = []
    for number in range(first, first + max(1, count // 16)):
        rng = np.random.default_rng(number)
        waves = [127 + 80 * np.sin(x / rng.uniform(15, 40)) + 40 * np.cos(y / rng.uniform(8, 30)) for _ in range(3)]
        pixels = np.stack(waves, axis=-1) + rng.normal(0, 22, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=89, exif=exif)
        raws.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(raws[number % len(raws)])


def _visit(warm: Path, root: Path, keywords: dict[str, int], checkout: Path | None) -> list[list[float]]:
    """Return seconds per image of the first and of the second visit, each of the thread and of the process."""
    path = str(checkout.absolute()) if checkout else modules_path()
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, str(warm), str(root), json.dumps(keywords)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a measurement failed: {done.stderr.strip()}")
    found: list[list[float]] = json.loads(done.stdout)
    return found


def measure(root: Path | None, before: Path | None, files: int, rounds: int) -> list[dict[str, Any]]:
    """Return rows of {variant, thread_us, process_us, again_us (per round), p20, p50, p80, check_us, ratio}.

    thread_us: CPU time of the data thread on the first visit; process_us: of all threads of its process; again_us: of
    the data thread on the second visit. check_us: first minus second. ratio: p50 over the first row's.
    """
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder, "warm")
        _draw(warm, _WARM, first=10_000)
        if root is None:
            root = Path(folder, "images")
            _draw(root, files)
        manifest = Path(folder, MANIFEST_FILE)
        write_index(root, manifest, check=True)
        plans: dict[str, tuple[Path, dict[str, int], Path | None]]
        plans = {name: (manifest if listed else root, words, None) for name, (words, listed) in VARIANTS.items()}
        if before is not None:
            plans = {BEFORE: (root, {}, before), **plans}
        taken: dict[str, list[list[list[float]]]] = {name: [] for name in plans}
        for _ in range(rounds):
            for name, (place, words, checkout) in plans.items():
                taken[name].append(_visit(warm, place, words, checkout))
    rows: list[dict[str, Any]] = []
    for name, visits in taken.items():
        own, everything = ([1e6 * visit[0][what] for visit in visits] for what in range(2))
        again, first = [1e6 * visit[1][0] for visit in visits], spread(own)
        row = {"variant": name, "thread_us": own, "process_us": everything, "again_us": again, **first}
        row["check_us"] = first["p50"] - median(again)
        rows.append(row | {"ratio": first["p50"] / (rows[0]["p50"] if rows else first["p50"])})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="-", help="file to write; - for standard output (default)")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="compare with this older checkout")
    parser.add_argument("--root", type=Path, help="folder of images; default: generate them")
    parser.add_argument("--files", type=int, default=4096, help="generate this many images; at least 2,048")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    require_result(args.json)
    rows = measure(args.root, args.before, max(2048, args.files), args.rounds)
    say = partial(print, file=sys.stderr if args.json == "-" else sys.stdout)
    for row in rows:
        say(
            f"{row['variant']}: {row['p50']:.0f} µs of the data thread ({row['p20']:.0f} – {row['p80']:.0f}), "
            f"{row['ratio']:.2f} of the first row; the check {row['check_us']:.0f} µs of it; "
            f"all threads of the process {median(row['process_us']):.0f} µs"
        )
    write_result(args.json, "first-visit", {"rows": rows, "command": sys.argv[1:]})
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.first_visit", main))
