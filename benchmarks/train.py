"""Train from JPEG files with `iwm-fast pretrain`; report medians over the steps after warm-up, and every logged step.

    python -m benchmarks.train --json FILE --scratch DIR [--device cuda|cpu] [--steps 60] [--limit SECONDS]

A few JPEGs are generated and copied under other names: decoding one file does not depend on the others. Each row is
written when its training ends.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from iwm_fast.data.tools.synth import draw_dataset
from iwm_fast.outputs import require_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["TRAINED", "train"]

# Configurations, with overrides that fit each into a minute.
TRAINED = {
    "cuda": {
        "vit_small_p16_224.yaml": ["train.global_batch=512", "train.micro_batch=512"],
        "vit_base_p16_224_equi.yaml": ["train.global_batch=512", "train.micro_batch=256"],
        "vit_large_p16_224.yaml": ["train.global_batch=256", "train.micro_batch=128"],
    },
    "cpu": {"vit_tiny_p4_32.yaml": ["train.global_batch=16"]},
}
# Steps not counted: allocation, autotuning, the decoder's warm-up.
_WARM_UP, _EVERY = 20, 10
_GENERATED = 64
_SIZES = {"cuda": (2048, 500), "cpu": (64, 64)}
_MEDIANS = ("images_per_s", "step_s", "data_wait_s", "overhead_s", "mfu", "memory_bytes")


def images(folder: Path, count: int, side: int) -> Path:
    """Return a folder of `count` JPEGs of `side` × `side` pixels; 64 are generated, the others copies."""
    root = folder / "train"
    if root.is_dir():
        return root
    draw_dataset(folder, train=min(count, _GENERATED), test=8, size=side)
    made = sorted(path for path in root.rglob("*") if path.is_file())
    for i in range(len(made), count):
        original = made[i % len(made)]
        shutil.copyfile(original, original.with_stem(f"{original.stem}-{i}"))
    return root


def train(
    config: str, overrides: list[str], root: Path, out: Path, device: str, steps: int, limit: float
) -> dict[str, Any]:
    """Return one row; if the training failed or exceeded its limit, `error` says so, beside the steps it logged."""
    command = [sys.executable, "-m", "iwm_fast", "pretrain", config, *overrides, f"data.root={root}"]
    command += [f"train.steps={steps}", "train.epochs=1000", f"log.every_steps={_EVERY}", "log.tensorboard=false"]
    command += [f"checkpoint.every_steps={steps}", f"data.device={'gpu' if device == 'cuda' else 'cpu'}"]
    row: dict[str, Any] = {"config": config, "overrides": overrides}
    try:
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False, timeout=limit)
        if done.returncode:
            row["error"] = f"exit code {done.returncode}: {done.stderr[-4000:]}"
    except subprocess.TimeoutExpired:
        row["error"] = f"not finished within {limit:.0f} s"
    return row | summary(out / "metrics.jsonl")


def summary(metrics: Path) -> dict[str, Any]:
    """Return medians of the logged steps after warm-up, and all of the steps."""
    if not metrics.is_file():
        return {"records": []}
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    counted = [record for record in records if record["step"] > _WARM_UP] or records[-1:]
    found: dict[str, Any] = {"records": records}
    for key in _MEDIANS:
        values = [record[key] for record in counted if record.get(key) is not None]
        found[key] = median(values) if values else None
    found["first_step_after_s"] = records[0].get("first_step_after_s") if records else None
    return found


def main() -> int:
    """Command line; return 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--scratch", type=Path, required=True, help="write images and runs here")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60, help="steps per training")
    parser.add_argument("--limit", type=float, default=600.0)
    args = parser.parse_args()
    require_result(args.json)
    require_folder(args.scratch, "--scratch")
    root = images(args.scratch / "images", *_SIZES[args.device])
    rows: list[dict[str, Any]] = []
    for config, overrides in TRAINED[args.device].items():
        out = args.scratch / "runs" / config.removesuffix(".yaml")
        rows.append(train(config, overrides, root, out, args.device, args.steps, args.limit))
        print(f"{config}: {rows[-1].get('error') or rows[-1]['images_per_s']}", file=sys.stderr, flush=True)
        if args.json != "-":
            write_result(args.json, "train", {"device": args.device, "rows": rows})  # a stopped run keeps its rows
    if args.json == "-":
        write_result("-", "train", {"device": args.device, "rows": rows})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.train", main))
