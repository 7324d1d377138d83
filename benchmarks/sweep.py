r"""Train several variants of a configuration at the same budget on several seeds, evaluate all alike, and tabulate.

    python -m benchmarks.sweep CONFIG --data DIR --out RUNS --json FILE --seeds 0 1 2 \\
        --arm none model.predictor.conditioning=none \
        --arm feature model.predictor.conditioning=feature \\
        --set train.steps=600

DIR holds train/ and test/, each with one folder per class, or with triplets. Each training and evaluation is an
`iwm-fast` command in a process of its own. Reported are means over the seeds with a 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any

from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.measure.continued import earlier, files_digest, require_data, require_different
from iwm_fast.outputs import require_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

SCHEMA = "iwm-fast-arms/1"
# Two-sided 95 % quantile of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SHOWN = (
    "loss_last",
    "mrr",
    "mrr_shuffled",
    "mrr_neutral",
    "mrr_bypass",
    "mrr_gain",
    "knn",
    "knn_untrained",
    "linear",
    "linear_untrained",
    "rank_me",
)


def interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean and the half-width of its 95 % interval; None for a single value."""
    half = _student(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "half_width": half}


def _student(freedom: int) -> float:
    """Return Student's two-sided 95 % quantile; from ten degrees of freedom on within 2e-4, by the first terms of its
    expansion (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    """
    if freedom in T95:
        return T95[freedom]
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def run_iwm(*arguments: str) -> float:
    """Run an iwm-fast command, which prints its own error; return its CPU seconds, with those of its own processes.

    Raise UserError if it fails.
    """
    with subprocess.Popen([sys.executable, "-m", "iwm_fast", *arguments]) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(
            f"iwm-fast {arguments[0]} ended with exit code {process.returncode}, as printed above; "
            "the same command resumes where it stopped"
        )
    return used.ru_utime + used.ru_stime


def run_one(config: str, data: Path, run: Path, seed: int, overrides: list[str], measure: list[str]) -> dict[str, Any]:
    """Train and evaluate once; return the evaluation, the curve, and the training's wall-clock and CPU seconds.

    A run that was interrupted is resumed, and its seconds are those since then; ``resumed`` says so. Raise
    UserError where a command fails, such as where ``run`` has a training with other settings.

    ``measure``: further arguments of `iwm-fast evaluate`.
    """
    data = data.resolve()
    resumed = (run / "metrics.jsonl").exists()
    began = time.perf_counter()
    keys = [f"data.root={data / 'train'}", f"train.seed={seed}", *overrides]
    cpu_seconds = run_iwm("pretrain", config, *keys, "--out", str(run), "--resume", "auto")
    seconds = time.perf_counter() - began
    answer = run / "evaluation.json"
    run_iwm("evaluate", str(run), "--data", str(data), *measure, "--json", str(answer))
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in curve if "loss" in r]
    evaluation = _without(json.loads(answer.read_text()), str(data), data.name)
    del evaluation["report"]  # a path on this machine
    evaluation |= {"loss_last": logged[-1]["loss"], "rank_me": logged[-1]["rank_me"]}
    return {
        "seed": seed,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "resumed": resumed,
        "steps": logged[-1]["step"],
        "evaluation": evaluation,
        "curve": curve,
    }


def _without(value: Any, folder: str, name: str) -> Any:
    """Return JSON whose texts name this machine's folder by its last part."""
    if isinstance(value, str):
        return re.sub(rf"{re.escape(folder)}(?![\w.-])", name, value)
    if isinstance(value, dict):
        return {key: _without(item, folder, name) for key, item in value.items()}
    return [_without(item, folder, name) for item in value] if isinstance(value, list) else value


def public(words: list[str]) -> list[str]:
    """Return the command without this machine's folders: an absolute path, also a key's or in its list, becomes its
    last part.
    """
    return [_public(word) for word in words]


def _public(word: str) -> str:
    if several := re.fullmatch(r"([\w.]+=)\[(.*)\]", word):
        return f"{several[1]}[{','.join(_public(part) for part in several[2].split(','))}]"
    return re.sub(r"^(\s*|[\w.]+=)/.*?([^/]*)/*$", r"\1\2", word)


def table(arms: list[dict[str, Any]], shown: Sequence[str] = SHOWN) -> str:
    """Return Markdown: one row per variant, mean ± half-width of the interval per column."""
    names = [n for n in shown if all(n in run["evaluation"] for arm in arms for run in arm["runs"])]
    lines = ["| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in arms:
        cells = [_cell([run["evaluation"][name] for run in arm["runs"]]) for name in names]
        lines.append(f"| {arm['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(arms: list[dict[str, Any]], name: str) -> str:
    """Return Markdown: one row per step at which training measured ``name``, mean ± half-width of the interval per
    variant.
    """
    found = [
        [{line["step"]: line[name] for line in run["curve"] if line.get(name) is not None} for run in arm["runs"]]
        for arm in arms
    ]
    steps = sorted({step for runs in found for run in runs for step in run})
    lines = [f"| {name} after step | " + " | ".join(arm["name"] for arm in arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for step in steps:
        values = [[run[step] for run in runs if step in run] for runs in found]
        lines.append(f"| {step} | " + " | ".join(_cell(own) for own in values) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    """Mean ± half-width of its interval; empty without values."""
    if not values:
        return ""
    found = interval(values)
    return f"{found['mean']:.3f}" + ("" if found["half_width"] is None else f" ± {found['half_width']:.3f}")


def adopt(arms: list[dict[str, Any]], json_file: Path, setting: dict[str, Any]) -> None:
    """Reuse the runs that a stopped sweep with the same setting left in its file, and append its other variants.

    Raise UserError if the file has another setting or other data: its results would not be comparable.
    """
    found = earlier(json_file, SCHEMA)
    if not found:
        return
    require_data(json_file, found, setting["data"])
    for key, value in setting.items():
        if key != "data" and found.get(key) != value:
            raise UserError(f"{json_file}: measured with {key} {found.get(key)!r}, not {value!r}; give another file")
    runs = {(arm["name"], tuple(arm["overrides"])): arm["runs"] for arm in found["arms"]}
    for arm in arms:
        arm["runs"] = runs.pop((arm["name"], tuple(public(arm["overrides"]))), [])
    arms.extend(arm for arm in found["arms"] if arm["runs"] and (arm["name"], tuple(arm["overrides"])) in runs)


def run_jobs(job: Callable[..., None], arguments: Iterable[tuple[Any, ...]], jobs: int) -> None:
    """Call ``job`` with each tuple of arguments, ``jobs`` at a time; raise the first error, without starting others."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(job, *each) for each in arguments]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def train_all(
    arms: list[dict[str, Any]],
    *,
    config: str,
    data: Path,
    out: Path,
    seeds: list[int],
    common: list[str],
    measure: list[str],
    json_file: Path,
    jobs: int = 1,
    about: dict[str, Any] | None = None,
) -> None:
    """Train and evaluate each variant (name, overrides, runs: []) on each seed, and write ``json_file`` after each.

    Resume by giving the same file: only missing runs are trained. Variants that it has besides are kept, and appended
    to ``arms``.

    ``common``: overrides for all variants. ``about``: further fields of the file.
    """
    lock = threading.Lock()
    setting = {
        "config": Path(config).name, "common": public(common), "measure": public(measure), "data": files_digest(data),
    }  # fmt: skip
    require_different("--seeds", seeds)
    require_different("variants' folders", [_folder(arm) for arm in arms])
    asked = list(arms)
    adopt(arms, json_file, setting)

    def job(arm: dict[str, Any], seed: int) -> None:
        run = out / f"{_folder(arm)}_{seed}"
        done = run_one(config, data, run, seed, [*common, *arm["overrides"]], measure)
        with lock:  # after each, so that a stopped sweep resumes with all that it has measured
            arm["runs"].append(done)
            arm["runs"].sort(key=lambda run: run["seed"])
            result = {"schema": SCHEMA, "environment": environment(), "command": public(sys.argv[1:])} | setting
            recorded = [arm | {"overrides": public(arm["overrides"])} for arm in arms]
            write_json(json_file, result | (about or {}) | {"arms": recorded}, indent=None)

    # Seeds outermost: a stopped sweep has every variant of the first seeds.
    missing = [(arm, seed) for seed in seeds for arm in asked if seed not in {run["seed"] for run in arm["runs"]}]
    run_jobs(job, missing, jobs)


def _folder(arm: dict[str, Any]) -> str:
    return str(arm["name"]).replace(" ", "_")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="write the runs here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arm", action="append", nargs="+", required=True, metavar="NAME [KEY=VALUE ...]",
        help="add a variant: its name and overrides; repeat for each",
    )  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of all variants")
    parser.add_argument("--what", default="mrr,knn,linear")
    parser.add_argument(
        "--measure", nargs="+", default=[], metavar="KEY=VALUE",
        help="override these keys in the evaluation of all variants, such as actions.strength=1",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="parallel trainings; give each OMP_NUM_THREADS threads")
    parser.add_argument("--curve", metavar="NAME", help="tabulate this metric of training by step too, such as mrr")
    args = parser.parse_args()
    require_result(args.json)
    require_folder(args.out)
    arms: list[dict[str, Any]] = [{"name": name, "overrides": keys, "runs": []} for name, *keys in args.arm]
    train_all(
        arms,
        config=args.config,
        data=args.data,
        out=args.out,
        seeds=args.seeds,
        common=args.set,
        measure=["--what", args.what, *args.measure],
        json_file=args.json,
        jobs=args.jobs,
    )
    print(table(arms))
    if args.curve:
        print(f"\n{curves(arms, args.curve)}")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.sweep", main))
