"""Compare trainings that predict one step and several steps ahead (train.horizon) at equal processor time.

    python -m benchmarks.steps_ahead game.yaml --data car --out RUNS --json FILE --horizons 1 2 4 --steps 1200

First a short training of each horizon gives its processor seconds per step; then each is trained for as many steps as
take the time of `--steps` steps of the first horizon, on each seed, and evaluated. Reported: the roll-outs' error,
alone and over that of a copy (each run measures in the space of its own target), and MRR; mean with a 95 % interval
over the seeds; where states are recorded, also the mean R² of their components, read from predictions. After an
interruption the same command resumes: short trainings are in RUNS/seconds_per_step.json, the others in FILE. Processor
seconds are of trainings that were not interrupted.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from iwm_fast.benchmarks.sweep import interval, public, run_iwm, train_all
from iwm_fast.config.load import find_config, load_config
from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.frames import open_triplets
from iwm_fast.eval.world_model.rollout import chains
from iwm_fast.measure.continued import earlier, files_digest, require_different
from iwm_fast.outputs import require_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

# Steps of the two short trainings, whose difference excludes the start; so many that what differs between two starts,
# a second or two, is little of it.
_SHORT = (10, 310)
_SECONDS = "iwm-fast-seconds-per-step/1"


def seconds_per_step(config: str, data: Path, out: Path, horizons: list[int], common: list[str]) -> dict[str, float]:
    """Return the processor seconds per step of each horizon, measured once for these settings and data; the file in
    `out` has them afterwards.
    """
    file = out / "seconds_per_step.json"
    setting = {
        "schema": _SECONDS, "config": Path(config).name, "common": public(common), "data": files_digest(data),
        "machine": platform.node(), "threads": os.environ.get("OMP_NUM_THREADS"),
    }  # fmt: skip
    before = earlier(file, _SECONDS)
    found: dict[str, float] = before.pop("seconds", {})
    if before != setting:
        found = {}
    for horizon in horizons:
        if str(horizon) in found:
            continue
        used = []
        for steps in _SHORT:
            run = out / f"short_{horizon}_{steps}"
            shutil.rmtree(run, ignore_errors=True)
            keys = [f"data.root={data / 'train'}", *common, f"train.horizon={horizon}", f"train.steps={steps}"]
            used.append(run_iwm("pretrain", config, *keys, "--out", str(run)))
            shutil.rmtree(run)
        found[str(horizon)] = (used[1] - used[0]) / (_SHORT[1] - _SHORT[0])
        write_json(file, setting | {"seconds": found})
    return found


def equal_steps(seconds: dict[str, float], horizons: list[int], steps: int) -> dict[int, int]:
    """Return the steps of each horizon that take the time of `steps` steps of the first."""
    budget = steps * seconds[str(horizons[0])]
    return {horizon: round(budget / seconds[str(horizon)]) for horizon in horizons}


def require_chains(config: str, data: Path, common: list[str]) -> None:
    """Raise UserError where the test triplets have no roll-outs to measure."""
    settings = load_config(find_config(config), common)
    if len(chains(open_triplets(data, settings), settings.eval.horizon)) < 2:
        raise UserError(
            f"{data}: its test set has fewer than two chains of eval.horizon {settings.eval.horizon} consecutive "
            "triplets, along which roll-outs are measured; lower eval.horizon with --set, or record longer episodes"
        )


def measured(run: dict[str, Any]) -> dict[str, float | None]:
    """Return what the table shows of one training; None: not measured."""
    found, rolled = run["evaluation"], run["evaluation"]["rollout"]
    last = len(rolled["model"]) - 1
    states = rolled["state_r2"]["prediction"][last] if "state_r2" in rolled else []
    read = [value for value in states if value is not None]
    return {
        "processor seconds": None if run.get("resumed") else run["cpu_seconds"],
        "error, 1 ahead": rolled["model"][0],
        f"error, {last + 1} ahead": rolled["model"][last],
        f"over a copy, {last + 1} ahead": rolled["model"][last] / rolled["copy"][last],
        f"other actions, {last + 1} ahead": rolled["shuffled"][last],
        "MRR": found["mrr"],
        "MRR, shuffled": found["mrr_shuffled"],
        "RankMe": found["rank_me"],
        **({f"R² of the state, {last + 1} ahead": sum(read) / len(read)} if read else {}),
    }


def table(arms: list[dict[str, Any]]) -> str:
    """Return Markdown: one row per horizon, mean ± half-width of the interval over the seeds."""
    rows = [[measured(run) for run in arm["runs"]] for arm in arms]
    names = list(rows[0][0])
    lines = ["| horizon | steps | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for arm, runs in zip(arms, rows, strict=True):
        cells = []
        for name in names:
            values = [value for run in runs if (value := run[name]) is not None]
            if not values:
                cells.append("–")
                continue
            both = interval(values)
            half = "" if both["half_width"] is None else f" ± {both['half_width']:.3g}"
            cells.append(f"{both['mean']:.4g}{half}")
        lines.append(f"| {arm['name']} | {arm['runs'][0]['steps']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", type=Path, required=True, help="holds train/ and test/ with triplets")
    parser.add_argument("--out", type=Path, required=True, help="write the runs here")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=1200, help="of the first horizon")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of all trainings")
    args = parser.parse_args()
    require_result(args.json)
    require_folder(args.out)
    require_different("--horizons", args.horizons)
    require_chains(args.config, args.data, args.set)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = seconds_per_step(args.config, args.data, args.out, args.horizons, args.set)
    steps = equal_steps(seconds, args.horizons, args.steps)
    arms: list[dict[str, Any]] = [
        {"name": str(k), "overrides": [f"train.horizon={k}", f"train.schedule_steps={steps[k]}"], "runs": []}
        for k in args.horizons
    ]
    train_all(
        arms, config=args.config, data=args.data, out=args.out, seeds=args.seeds, common=args.set,
        measure=["--what", "mrr,rollout"], json_file=args.json, about={"cpu_seconds_per_step": seconds},
    )  # fmt: skip
    print(table(arms))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.steps_ahead", main))
