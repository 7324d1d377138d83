"""Build, check and time on one GPU all there is, and write JSON: the program to run where a GPU is at hand for
minutes only.

    python -m benchmarks.gpu_suite --out OUT [--parts doctor ceilings kernels tests train] [--steps 60]

Each part writes ``OUT/PART.json`` as soon as it is done, so that a run that is cut off leaves what it had measured;
a part that fails writes its error instead, the others go on, and the exit code is 1. Nothing is downloaded.
``--device cpu`` runs the same program at toy size where there is no GPU, to see that it works; its numbers are of
that CPU and say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import timing
from benchmarks.contenders import CONTENDERS
from benchmarks.kernels import CASES, measure
from iwm_fast.data.synth import draw_dataset
from iwm_fast.doctor import examine
from iwm_fast.kernels import TUNING_DIR_VARIABLE
from iwm_fast.planning.environment import environment

SCHEMA = "iwm-fast-gpu-suite/1"
# Configurations trained, with what makes them fit a measurement of a minute.
TRAINED = {
    "cuda": {
        "vit_small_p16_224.yaml": ["train.global_batch=512", "train.micro_batch=512"],
        "vit_base_p16_224_equi.yaml": ["train.global_batch=512", "train.micro_batch=256"],
        "vit_large_p16_224.yaml": ["train.global_batch=256", "train.micro_batch=128"],
    },
    "cpu": {"vit_tiny_p4_32.yaml": ["train.global_batch=16"]},
}
# Steps before the first that counts: allocation, autotuning, the decoder's own warm-up.
WARM_UP = 10


def doctor(_: argparse.Namespace, __: torch.device) -> dict[str, Any]:
    """What of the stack runs here."""
    return {"parts": [asdict(part) for part in examine()]}


def ceilings(_: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The machine's own limits: a copy, and a bf16 matrix product."""
    return timing.ceilings(device)


def kernels(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every contender of benchmarks.kernels on every case, and the choices that the tuner made for them."""
    cases = CASES if device.type == "cuda" else CASES[:1]
    found = measure(cases, device, args.repeats, partial(print, flush=True))
    tables = {path.name.split("-triton-")[0]: json.loads(path.read_text()) for path in _tuning(args).glob("*.json")}
    # In the form of kernels/tuned.json, to be copied there.
    (args.out / "tuned.json").write_text(json.dumps({"schema": "iwm-fast-tuned/1", "devices": tables}, indent=1) + "\n")
    return found | {"contenders": {name: c.version for name, c in CONTENDERS.items()}}


def _tuning(args: argparse.Namespace) -> Path:
    path: Path = args.out / "tuning"
    return path


def tests(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run tests/gpu, and the kernels' tests on the GPU, with pytest: exit code and the end of what it said.

    On a CPU, two of the interpreter's tests show that the part works.
    """
    chosen = ["tests/gpu", "tests/triton"] if device.type == "cuda" else ["tests/gpu", "tests/triton", "-k", "opcheck"]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-W", "ignore", "--durations=10", *chosen]
    environment = os.environ | ({} if device.type == "cuda" else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.limit, env=environment)
    if done.returncode:
        raise RuntimeError(f"pytest exited with {done.returncode}: {done.stdout[-6000:]}{done.stderr[-2000:]}")
    return {"returncode": done.returncode, "said": done.stdout[-6000:]}


def train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The whole path from JPEG files, by the command line: medians over the steps after warm-up, and every logged
    step.
    """
    images = args.out / "images"
    side = 500 if device.type == "cuda" else 64
    draw_dataset(images, train=2048 if device.type == "cuda" else 64, test=8, size=side)
    rows = []
    for config, overrides in TRAINED[device.type].items():
        run = args.out / "runs" / config.removesuffix(".yaml")
        command = [sys.executable, "-m", "iwm_fast", "pretrain", config, *overrides, f"data.root={images / 'train'}"]
        command += [f"train.steps={args.steps}", "train.epochs=1000", "log.every_steps=1", "log.tensorboard=false"]
        command += ["checkpoint.every_steps=100000", f"data.device={'gpu' if device.type == 'cuda' else 'cpu'}"]
        done = subprocess.run(
            [*command, "--out", str(run)], capture_output=True, text=True, check=False, timeout=args.limit
        )
        row: dict[str, Any] = {"config": config, "overrides": overrides, "returncode": done.returncode}
        if done.returncode:
            row["said"] = done.stderr[-4000:]
        else:
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            counted = records[min(WARM_UP, len(records) - 1) :]
            for key in ("images_per_s", "step_s", "data_wait_s", "overhead_s", "mfu", "memory_bytes"):
                values = [r[key] for r in counted if r[key] is not None]
                row[key] = median(values) if values else None
            row["first_step_after_s"] = records[0]["first_step_after_s"]
            row["records"] = records
        rows.append(row)
    if any(row["returncode"] for row in rows):
        raise RuntimeError(json.dumps(rows))
    return {"rows": rows}


PARTS = {part.__name__: part for part in (doctor, ceilings, kernels, tests, train)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--repeats", type=int, default=30, help="of each timed call")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds that a subprocess may take")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; --device cpu shows that the program works", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[TUNING_DIR_VARIABLE] = str(_tuning(args).resolve())
    device, failed = torch.device(args.device), []
    for name in args.parts:
        begin = time.perf_counter()
        result: dict[str, Any] = {"schema": SCHEMA, "part": name, "device": args.device, "environment": environment()}
        try:
            result |= PARTS[name](args, device)
        except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
            failed.append(name)
            result |= {"error": str(error), "traceback": traceback.format_exc()}
        result["seconds"] = time.perf_counter() - begin
        (args.out / f"{name}.json").write_text(json.dumps(result) + "\n")
        print(f"{name}: {'failed' if name in failed else 'done'} in {result['seconds']:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
