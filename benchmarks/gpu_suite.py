"""Build, check and time on one GPU all there is, and write JSON: the program to run where a GPU is at hand for
minutes only.

    python -m benchmarks.gpu_suite --out OUT [--ijepa CHECKOUT] [--parts kernels step ...]

Each part runs in a process of its own and writes ``OUT/PART.json`` as soon as it is done, so that a run that is cut off
leaves what it had measured; a part that fails, dies or hangs leaves its error instead, the others go on, and the exit
code is 1. Together they take at most ``--budget`` seconds, nine minutes by default. Nothing is downloaded.
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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from iwm_fast.benchmarks import timing
from iwm_fast.benchmarks.contenders import CONTENDERS
from iwm_fast.benchmarks.kernel_cases import CASES
from iwm_fast.benchmarks.kernels import measure
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
SETTINGS = ("train.compile", "train.target_stream")
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


def _json(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a program of ours that writes its answer to the file after ``--json``; that answer."""
    words = [sys.executable, "-m", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(Path(command[command.index("--json") + 1]).read_text())
    return answer


def step(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The step of every preset of the device, on random pixels; on a GPU also what a setting of SETTINGS gains."""
    few = [] if device.type == "cuda" else ["--preset", "cpu-micro", "--repeats", "5", "--threads", "1"]
    file = str(args.out / "bench_step.json")
    found = _json(["iwm_fast", "bench", "step", "--device", device.type, *few, "--json", file], args.limit)
    found["settings"] = []
    for key in SETTINGS if device.type == "cuda" else ():
        command = ["iwm_fast.benchmarks.settings", f"{key}=true", "--json", str(args.out / f"bench_{key}.json")]
        command += ["--config", "vit_base_p16_224_equi.yaml", "--batch", "256", "--common", "train.micro_batch=256"]
        found["settings"] += _json([*command, "--repeats", "20", "--device", "cuda"], args.limit)["rows"]
    return found


def peers(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The step beside the others', with ijepa's where --ijepa names a checkout."""
    file = str(args.out / "bench_peers.json")
    command = ["iwm_fast.benchmarks.peers", "--device", device.type, "--json", file, "--limit", "40"]
    command += ["--ijepa", str(args.ijepa)] if args.ijepa else []
    if device.type == "cuda":
        command += ["--shape", "ViT-B/16 224 12x384", "ViT-L/16 224 12x384", "ViT-B/16 224 18x384"]
    else:
        command += ["--rounds", "3", "--threads", "1", "--shape", "ViT-Ti/8 96 6x192", "--peers", "plain"]
    return _json(command, args.limit)


def attention(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Attention at the step's own lengths beside every other way that is installed."""
    file, rounds = str(args.out / "bench_attention.json"), "15" if device.type == "cuda" else "1"
    return _json(
        ["iwm_fast.benchmarks.attention", "--device", device.type, "--json", file, "--rounds", rounds], args.limit
    )


def profile(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Where the time of a step goes; the trace and the pictures lie in OUT/profile."""
    config, *overrides = (
        ["vit_base_p16_224_equi.yaml", "train.global_batch=256", "train.micro_batch=256"]
        if device.type == "cuda"
        else ["vit_tiny_p4_32.yaml", "train.global_batch=16"]
    )
    file = str(args.out / "bench_profile.json")
    folder = ["--out", str(args.out / "profile"), "--json", file, "--steps", "5"]
    folder += [] if device.type == "cuda" else ["--threads", "1"]
    return _json(["iwm_fast", "profile", config, *overrides, *folder, "--device", device.type], args.limit)


def scaling(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Batches and CPU ranks; a small model, so that the host's part shows."""
    file = str(args.out / "bench_scaling.json")
    largest = "512" if device.type == "cuda" else "16"
    command = ["iwm_fast", "bench", "scaling", "--json", file, "--largest", largest, "--repeats", "3"]
    return _json(command + ([] if device.type == "cuda" else ["train.global_batch=4"]), args.limit)


# Most valuable first: a run that is cut off has what it had measured.
PARTS = {
    part.__name__: part for part in (doctor, ceilings, kernels, step, peers, attention, profile, tests, train, scaling)
}


def run_part(name: str, args: argparse.Namespace) -> int:
    """Do one part in this process and write what it found, or its error; 1 where it failed."""
    begin = time.perf_counter()
    device = torch.device(args.device)
    result: dict[str, Any] = {"schema": SCHEMA, "part": name, "device": args.device, "environment": environment()}
    failed = False
    try:
        result |= {key: value for key, value in PARTS[name](args, device).items() if key != "environment"}
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, AssertionError, LookupError) as error:
        failed = True
        result |= {"error": str(error), "traceback": traceback.format_exc()}
    _write(args.out, name, result | {"seconds": time.perf_counter() - begin})
    return int(failed)


def _write(out: Path, name: str, result: dict[str, Any]) -> None:
    (out / f"{name}.json").write_text(json.dumps(result) + "\n")


def run_apart(name: str, args: argparse.Namespace, left: float) -> str:
    """Do one part in a process of its own, which may die or hang without the others; how it went."""
    command = [sys.executable, "-m", "iwm_fast.benchmarks.gpu_suite", "--alone", name, "--out", str(args.out)]
    command += ["--device", args.device, "--steps", str(args.steps), "--repeats", str(args.repeats)]
    command += ["--limit", str(min(args.limit, left)), *(["--ijepa", str(args.ijepa)] if args.ijepa else [])]
    begin, why = time.perf_counter(), ""
    try:
        code = subprocess.run(command, check=False, timeout=left).returncode
        if code not in (0, 1):
            why = f"its process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        code, why = 1, f"stopped after {left:.0f} s: no time was left"
    if why:
        base = {"schema": SCHEMA, "part": name, "device": args.device, "environment": environment(), "error": why}
        _write(args.out, name, base | {"seconds": time.perf_counter() - begin})
    return why or ("failed" if code else "done")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--repeats", type=int, default=30, help="of each timed call")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds that a part's program may take")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds that all parts together may take")
    parser.add_argument("--ijepa", type=Path, help="a clone of facebookresearch/ijepa, for the part peers")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; --device cpu shows that the program works", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[TUNING_DIR_VARIABLE] = str(_tuning(args).resolve())
    if args.alone:
        return run_part(args.alone, args)
    begin, went = time.monotonic(), {}
    for name in args.parts:
        left = args.budget - (time.monotonic() - begin)
        started = time.monotonic()
        went[name] = run_apart(name, args, left) if left > 0 else "not begun: no time was left"
        print(f"{name}: {went[name]} in {time.monotonic() - started:.0f} s", flush=True)
    return int(any(how != "done" for how in went.values()))


if __name__ == "__main__":
    sys.exit(main())
