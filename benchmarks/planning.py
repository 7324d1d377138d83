"""Measure how often planning reaches a goal, beside three controls, and how fast it plans.

    python -m benchmarks.planning --runs RUN RUN RUN ... --json FILE [--distance state] [--policies plan random]
    python -m benchmarks.planning --speed --threads 2 --json FILE

Success: each run acts in the environment that its data were recorded from, with that environment's settings below, in
the same episodes for every policy. Controls: `greedy` plans one action ahead; `shuffled` predicts each candidate given
another candidate's actions; `random` is the recording's player. Rows of another distance are measured by the same
command with `--distance`. FILE is written after each episode; the same command resumes. Intervals are Wilson's, 95 %,
over the episodes of all runs of an environment.

Speed: one CEM iteration of 1,000 candidates × 8 actions at game.yaml's size with random weights, beside
stable-worldmodel's CEM on the same cost where it is installed. Before it is timed, the batched cost must be that of the
candidates one by one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from iwm_fast.benchmarks.adapters import stable_worldmodel
from iwm_fast.benchmarks.adapters.inputs import SideMissing
from iwm_fast.config.load import find_config, load_config
from iwm_fast.environment import environment, installed_version
from iwm_fast.errors import UserError
from iwm_fast.eval.acting.act import Acting, act, open_actor, summary
from iwm_fast.eval.acting.episodes import POLICIES, PolicyName
from iwm_fast.eval.stats import wilson_interval
from iwm_fast.eval.world_model.planning.cost import Distance, GoalCost
from iwm_fast.eval.world_model.planning.distributions import ActionKind
from iwm_fast.eval.world_model.planning.plan import Settings
from iwm_fast.eval.world_model.planning.solvers import Search, search
from iwm_fast.games import POINT_MASS
from iwm_fast.measure.continued import earlier
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

SCHEMA = "iwm-fast-bench-planning/1"
# Of each environment: how it is planned in, and the most decisions of an episode. Chosen on episodes of other seeds.
PLAYED: dict[str, dict[str, Any]] = {
    "FrozenLake-v1": {  # not all 4⁶ sequences: the environment is the same in each episode, so the search has to differ
        "settings": {"horizon": 6, "candidates": 300, "iterations": 3, "score": "nearest"}, "every": 1, "most": 20,
    },
    POINT_MASS: {
        "settings": {"horizon": 14, "candidates": 300, "iterations": 4, "score": "arrival"}, "every": 2, "most": None,
    },
    "MountainCarContinuous-v0": {  # twice the fewest decisions that it needs: in all 62 a random player gets there
        "settings": {"horizon": 8, "candidates": 300, "iterations": 4, "score": "arrival"}, "every": 1, "most": 12,
    },
}  # fmt: skip
_SEED = 1
_SHAPE = {"candidates": 1000, "horizon": 8}


def measure_run(
    run: Path,
    episodes: int,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
    *,
    distance: Distance = "l2",
    policies: Sequence[PolicyName] = POLICIES,
) -> None:
    """Play the policies with a run; ``rows`` has what is known of it, and gets each episode as it is played."""
    actor = open_actor(run)
    if actor.recording is None or actor.recording.env not in PLAYED:
        found = "no recording" if actor.recording is None else actor.recording.env
        raise UserError(f"{run}: trained on {found}; give runs on {', '.join(PLAYED)}")
    env = actor.recording.env
    told = PLAYED[env]
    settings = {**told["settings"], "distance": distance}
    for policy in policies:
        setting = {
            "run": run.resolve().name, "step": actor.step, "env": env, "policy": policy,
            "plan": settings, "replan": told["every"], "decisions": told["most"], "seed": _SEED,
        }  # fmt: skip
        row = next((one for one in rows if {key: one.get(key) for key in setting} == setting), None)
        if row is None:
            row = {**setting, "episodes": [], "cpu_seconds": 0.0}
            rows.append(row)
        acting = Acting(
            env, episodes=episodes, every=told["every"], most=told["most"], policy=policy,
            settings=Settings(**settings), seed=_SEED,
        )  # fmt: skip
        began, before = time.process_time(), row["cpu_seconds"]

        def keep(records: list[dict[str, Any]], row: dict[str, Any] = row) -> None:
            row["episodes"] = records
            row["cpu_seconds"] = before + time.process_time() - began  # noqa: B023  (called before the next policy)
            save()

        records = act(actor, acting, known=row["episodes"][:episodes], give=keep)
        share = summary(records)["success"]
        print(f"{setting['run']}  {policy}, {distance}: {share:.2f} of {episodes} episodes", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: success of each policy in each environment, by each distance, over all runs, with its
    interval.
    """
    lines = ["| environment | distance | runs | " + " | ".join(POLICIES) + " |", "|---" * (len(POLICIES) + 3) + "|"]
    for env, distance in dict.fromkeys((row["env"], row["plan"]["distance"]) for row in rows):
        own = [row for row in rows if (row["env"], row["plan"]["distance"]) == (env, distance)]
        cells = [env, distance, str(len({row["run"] for row in own}))]
        for policy in POLICIES:
            ends = [episode["success"] for row in own if row["policy"] == policy for episode in row["episodes"]]
            low, high = wilson_interval(sum(ends), len(ends)) if ends else (0.0, 1.0)
            cells.append(f"{sum(ends)} of {len(ends)} ({low:.2f} – {high:.2f})" if ends else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure_speed(threads: int, rounds: int) -> dict[str, Any]:
    """Return seconds of a CEM iteration, p20, p50 and p80 over rounds, of ours and of stable-worldmodel's in turn."""
    torch.set_num_threads(threads)
    model = IWM(load_config(find_config("game.yaml"), ["data.root=none"]).model, 2).eval()
    side = model.config.image
    pictures = torch.randint(0, 256, (2, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        cost = GoalCost(model, model.encode(pictures[:1]), model.targets(pictures[1:]))
    _require_equal(cost)
    kind = ActionKind(-torch.ones(2), torch.ones(2))
    how = Search(_SHAPE["horizon"], _SHAPE["candidates"], 1)
    sides: dict[str, Callable[[], Any]] = {"iwm-fast": lambda: search(cost, kind, how)}
    missing = None
    try:
        sides["stable-worldmodel"] = stable_worldmodel.cem(cost, components=2, iterations=1, **_SHAPE)
    except SideMissing as error:
        missing = str(error)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, plan in sides.items():
            began = time.perf_counter()
            plan()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - began)
    predictions = _SHAPE["candidates"] * _SHAPE["horizon"]
    found = {
        name: {
            **{f"p{q}_seconds": float(np.quantile(values, q / 100)) for q in (20, 50, 80)},
            "candidate_steps_per_second": predictions / float(np.median(values)),
        }
        for name, values in times.items()
    }
    version = installed_version("stable-worldmodel")
    told = {"threads": threads, "rounds": rounds, **_SHAPE, "stable_worldmodel": version, "missing": missing}
    return {"config": "game.yaml", **told, "sides": found}


def _require_equal(cost: GoalCost) -> None:
    """Raise SystemExit where the packed batches' costs are not those of single candidates, to fp32's rounding."""
    actions = torch.rand(7, 3, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    alone = torch.cat([cost(one[None]) for one in actions])
    if not torch.allclose(cost(actions), alone, rtol=1e-4):
        raise SystemExit("planning: the batched costs are not those of single candidates; nothing was timed")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of pretrain on recorded games")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--distance", choices=get_args(Distance), default="l2", help="of plans to the goal")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--speed", action="store_true", help="time a CEM iteration")
    parser.add_argument("--threads", type=int, default=2, help="torch's, of --speed")
    parser.add_argument("--rounds", type=int, default=20, help="of --speed")
    args = parser.parse_args()
    if not (args.runs or args.speed):
        parser.error("give --runs, or --speed")
    require_result(args.json)
    told = earlier(args.json, SCHEMA)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(),
        "speed": told.get("speed"),
        "rows": told.get("rows", []),
    }

    def save() -> None:
        write_json(args.json, result, indent=None)

    if args.speed:
        result["speed"] = measure_speed(args.threads, args.rounds)
        save()
        for name, found in result["speed"]["sides"].items():
            print(f"{name}: {found['p50_seconds']:.3f} s per iteration, {found['candidate_steps_per_second']:.0f} /s")
    for run in args.runs:
        measure_run(run, args.episodes, result["rows"], save, distance=args.distance, policies=args.policies)
    if result["rows"]:
        print(table(result["rows"]))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.planning", main))
