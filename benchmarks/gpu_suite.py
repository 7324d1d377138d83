"""Build, test and time everything on one GPU within minutes, and write JSON.

    python -m benchmarks.gpu_suite --out OUT [--ijepa CHECKOUT] [--parts step kernels ...] [--dry]

Each part is a program in a process group of its own, killed at its time limit. A part writes its rows as it measures
them, so a killed part leaves those it had. ``OUT/PART.json`` holds its rows, its exit code and, if it failed, its last
output. A failing part costs the others nothing but time. All parts together take at most ``--budget`` seconds.
``OUT/results.tar.gz`` holds everything and is rewritten after each part. Nothing is downloaded. ``--device cpu`` runs
the same parts at toy size without a GPU, as a check that they work; their results name that CPU. ``--dry`` prints the
parts with their limits and the packages that they need.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iwm_fast.environment import environment
from iwm_fast.kernels import TUNING_DIR_VARIABLE
from iwm_fast.outputs import require_folder
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

__all__ = ["PARTS", "Part", "limit_of", "main"]

SCHEMA = "iwm-fast-gpu-suite/2"
_SETTINGS = ("train.compile=true", "train.target_stream=true", "model.attention=efficient", "train.optimizer=muon")
_BASE = ("vit_base_p16_224_equi.yaml", "train.global_batch=256", "train.micro_batch=256")
# Baselines that autotune over many kernels before they run one.
_TUNED = ("compile max-autotune", "compile max-autotune, CUDA graphs", "quack")
_TINY = ("vit_tiny_p4_32.yaml", "train.global_batch=16")
# A rented machine may limit what it returns: larger traces are left out, and the suite says so.
_ARCHIVE_BYTES = 16 * 2**20
_LEFT_OUT = (".jpg", ".jpeg", ".png", ".safetensors", ".tar.gz", ".cubin")


@dataclass(frozen=True)
class Part:
    """One program: command(args, file) gives the words after ``python -m``; the program writes its JSON to file.

    limit: seconds on a GPU. needs: packages that it requires, beside torch and Triton.
    """

    limit: float
    command: Callable[[argparse.Namespace, Path], list[str]]
    needs: tuple[str, ...] = ("deepspeed", "xformers")
    what: str = ""


def _on_gpu(args: argparse.Namespace) -> bool:
    return bool(args.device == "cuda")


def _doctor(_: argparse.Namespace, file: Path) -> list[str]:
    return ["iwm_fast", "doctor", "--json", str(file)]


def _ceilings(args: argparse.Namespace, file: Path) -> list[str]:
    return ["iwm_fast.benchmarks.ceilings", "--device", args.device, "--json", str(file)]


def _step(args: argparse.Namespace, file: Path) -> list[str]:
    few = [] if _on_gpu(args) else ["--preset", "cpu-micro", "--repeats", "5", "--threads", "1"]
    return ["iwm_fast", "bench", "step", "--device", args.device, *few, "--json", str(file)]


def _attention(args: argparse.Namespace, file: Path) -> list[str]:
    # On a CPU, flex attention alone compiles for ten seconds per case and longer.
    small = ["--rounds", "1", "--dtype", "fp32", "--only", "vit_tiny_p4_32 context"]
    few = ["--rounds", "15"] if _on_gpu(args) else small
    return ["iwm_fast.benchmarks.attention", "--device", args.device, "--json", str(file), *few]


def _kernels(args: argparse.Namespace, file: Path) -> list[str]:
    few = [] if _on_gpu(args) else ["--only", "stopgrad_l2", "--repeats", "3"]
    words = ["iwm_fast.benchmarks.kernels", "--device", args.device, "--json", str(file), *few]
    return [*words, "--without", *_TUNED]


def _autotune(args: argparse.Namespace, file: Path) -> list[str]:
    few = [] if _on_gpu(args) else ["--repeats", "3"]
    words = ["iwm_fast.benchmarks.kernels", "--device", args.device, "--json", str(file), *few]
    return [*words, "--only", "conditioned_mlp", "--contenders", "iwm-fast triton", *_TUNED]


def _profile(args: argparse.Namespace, file: Path) -> list[str]:
    config = _BASE if _on_gpu(args) else (*_TINY, "--threads", "1")
    folder = ["--out", str(args.out / "profile"), "--steps", "5", "--device", args.device]
    return ["iwm_fast", "profile", *config, *folder, "--json", str(file)]


def _peers(args: argparse.Namespace, file: Path) -> list[str]:
    words = ["iwm_fast.benchmarks.peers", "--device", args.device, "--json", str(file), "--limit", "25"]
    words += ["--until", f"{0.85 * args.limit:.0f}"]  # the rest is for imports and shutdown
    words += ["--ijepa", str(args.ijepa)] if args.ijepa else []
    if _on_gpu(args):
        return [*words, "--shape", "ViT-B/16 224 12x384", "ViT-L/16 224 12x384", "ViT-B/16 224 18x384"]
    return [*words, "--rounds", "3", "--threads", "1", "--shape", "ViT-Ti/8 96 6x192", "--peers", "plain"]


def _tests(args: argparse.Namespace, file: Path) -> list[str]:
    # On a GPU what is slow elsewhere is not.
    chosen = ["tests/gpu", "tests/triton", *(["-m", ""] if _on_gpu(args) else ["-k", "opcheck"])]
    del file  # pytest's output is recorded, as every part's
    return ["pytest", "-q", "-rs", "-W", "ignore", "-p", "no:cacheprovider", "--durations=10", *chosen]


def _train(args: argparse.Namespace, file: Path) -> list[str]:
    words = ["iwm_fast.benchmarks.train", "--device", args.device, "--steps", str(args.steps), "--limit", "60"]
    return [*words, "--scratch", str(args.out / "train"), "--json", str(file)]


def _settings(args: argparse.Namespace, file: Path) -> list[str]:
    config, *common = _BASE if _on_gpu(args) else _TINY
    settings = _SETTINGS if _on_gpu(args) else _SETTINGS[:1]  # the others need a GPU
    words = ["iwm_fast.benchmarks.setting_gain", *settings, "--each", "--json", str(file), "--config", config]
    few = ["--batch", "256", "--repeats", "20"] if _on_gpu(args) else ["--batch", "16", "--repeats", "3"]
    return [*words, "--common", *common, "zero.stage=0", *few, "--device", args.device]


def _optimizers(args: argparse.Namespace, file: Path) -> list[str]:
    configs = [_BASE[0], "vit_large_p16_224.yaml"] if _on_gpu(args) else [_TINY[0]]
    few = [] if _on_gpu(args) else ["--repeats", "2"]
    return ["iwm_fast.benchmarks.optimizers", "--config", *configs, *few, "--device", args.device, "--json", str(file)]


# Most valuable first: a suite that is cut off has those. The limits of all but the last add up to nine minutes.
PARTS = {
    "doctor": Part(30, _doctor, ("deepspeed", "xformers", "dali"), "which parts of the stack run here"),
    "ceilings": Part(20, _ceilings, (), "copy and L2 bandwidth, matmul throughput, launch time"),
    "step": Part(80, _step, what="the step of every preset on random pixels, checked against float64"),
    "attention": Part(40, _attention, ("xformers",), "packed attention at the step's sequence lengths"),
    "kernels": Part(80, _kernels, (), "every kernel against its baselines, checked against float64"),
    "profile": Part(40, _profile, what="time of a step by part, with a trace"),
    "peers": Part(80, _peers, what="the whole step against ijepa and plain PyTorch"),
    "tests": Part(60, _tests, what="tests/gpu and the kernels' tests on the GPU"),
    "train": Part(50, _train, ("deepspeed", "xformers", "dali"), "training from JPEG files"),
    "settings": Part(30, _settings, what="gain of train.compile, target_stream, model.attention; cost of Muon"),
    "optimizers": Part(30, _optimizers, ("deepspeed",), "a step of Muon beside PyTorch's and DeepSpeed's"),
    "autotune": Part(300, _autotune, (), "the conditioned MLP against max-autotune and QuACK, which tune for minutes"),
}


def limit_of(name: str, args: argparse.Namespace, left: float) -> float:
    """Return a part's limit in seconds, at most the time left; the last part gets all the time left."""
    if name == args.parts[-1]:
        return left
    patience = args.patience or (1.0 if _on_gpu(args) else 2.0)
    return min(PARTS[name].limit * patience, left)


def run_part(name: str, args: argparse.Namespace, left: float) -> str:
    """Run a part until its limit; return "done" or what went wrong."""
    part, file, log = PARTS[name], args.out / f".{name}.json", args.out / f"{name}.log"
    limit = limit_of(name, args, left)
    environment_ = os.environ | ({"TRITON_INTERPRET": "1"} if name == "tests" and not _on_gpu(args) else {})
    file.unlink(missing_ok=True)
    begin, error = time.monotonic(), ""
    with log.open("w") as said:
        words = [sys.executable, "-m", *part.command(argparse.Namespace(**vars(args), limit=limit), file)]
        process = subprocess.Popen(words, stdout=said, stderr=said, env=environment_, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code, error = None, f"killed at its limit, {limit:.0f} s"
        _end(process)
    result = _read(file)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = [line for line in lines if "warning" not in line.lower()][-1:]
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        error = f"{ended}: {' '.join(_broken(result) or last)}"
    file.unlink(missing_ok=True)
    document = {
        "schema": SCHEMA, "part": name, "device": args.device, "command": words[2:], "exit_code": code,
        "seconds": time.monotonic() - begin, "environment": environment(),
    }  # fmt: skip
    if error:
        document["error"] = error
    document["said"] = log.read_text(errors="replace")[-6000:]
    document["result"] = {key: value for key, value in result.items() if key not in ("schema", "environment")}
    write_json(args.out / f"{name}.json", document, indent=None)
    return error or "done"


def _broken(result: dict[str, Any]) -> list[str]:
    """Return doctor's broken parts; the last lines of its output are about working ones."""
    return [f"{part['part']}: {part['reason']}." for part in result.get("parts", []) if part.get("broken")]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the part's process group, with all that it started."""
    with contextlib.suppress(ProcessLookupError):  # the group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def archive(out: Path) -> str:
    """Pack the parts' files into OUT/results.tar.gz, smallest first; return its size and what did not fit."""
    target, left_out = out / "results.tar.gz", []
    files = [p for p in out.rglob("*") if p.is_file() and "train" not in p.relative_to(out).parts[:1]]
    files = [p for p in files if not p.name.endswith(_LEFT_OUT) and not p.name.startswith(".")]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(files, key=lambda p: p.stat().st_size):
            before = packed.tell()
            if before + path.stat().st_size // 4 > _ARCHIVE_BYTES:  # traces compress to a tenth
                left_out.append(path.relative_to(out).as_posix())
                continue
            tar.add(path, path.relative_to(out).as_posix())
    partial = target.with_name(".results.partial")
    partial.write_bytes(packed.getvalue())
    partial.replace(target)
    return f"results.tar.gz: {len(packed.getvalue()) / 2**20:.1f} MiB" + (
        f"; left out for its size: {', '.join(left_out)}" if left_out else ""
    )


def _tuned(out: Path) -> None:
    """Write the tuner's and the attention part's choices, in the form of kernels/tuned.json, to be copied there."""
    tables = {path.name.split("-triton-")[0]: _read(path) for path in (out / "tuning").glob("*.json")}
    attention = _read(out / "attention.json").get("result", {}).get("table", {})
    if tables or attention:
        found = {"schema": "iwm-fast-tuned/1", "devices": tables, "attention": attention}
        write_json(out / "tuned.json", found, indent=1)


def _dry(args: argparse.Namespace) -> None:
    total = 0.0
    for name in args.parts:
        part = PARTS[name]
        total += part.limit
        print(f"{name:10} at most {part.limit:4.0f} s  needs {', '.join(part.needs) or '-':26} {part.what}")
    print(f"together at most {total:.0f} s; the last part may use what the others leave of {args.budget:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[name for name in PARTS if name != "autotune"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=60, help="steps per training")
    parser.add_argument("--budget", type=float, default=540.0, help="stop after this many seconds")
    parser.add_argument("--patience", type=float, help="factor on each part's limit; default: 1 on a GPU, 2 on a CPU")
    parser.add_argument("--ijepa", type=Path, help="clone of facebookresearch/ijepa, for the part peers")
    parser.add_argument("--dry", action="store_true", help="print the parts and their limits; run nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; return 1 if a part failed."""
    args = _parser().parse_args(argv)
    require_folder(args.out)
    if args.dry:
        _dry(args)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; check the programs with --device cpu", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[TUNING_DIR_VARIABLE] = str((args.out / "tuning").resolve())
    begin, went = time.monotonic(), {}
    for name in args.parts:
        left = args.budget - (time.monotonic() - begin)
        started = time.monotonic()
        went[name] = run_part(name, args, left) if left > 0 else "not started: no time was left"
        print(f"{name}: {went[name]} in {time.monotonic() - started:.0f} s", flush=True)
        _tuned(args.out)
        said = archive(args.out)
    print(said, flush=True)
    return int(any(how != "done" for how in went.values()))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.gpu_suite", main))
