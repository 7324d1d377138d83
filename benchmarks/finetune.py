r"""Compare what can be trained on a frozen run: a head, a new predictor, or its own predictor, at one training budget.

    python -m benchmarks.finetune RUN... --data DIR --json FILE [--limit N...] [--epochs E | --steps S] [--batch B]
        [--lr RATE,...]

Each RUN is one seed of the same training, and its cells have its seed. Each cell of the table is one `iwm-fast
finetune` command. All modes train on the same images for the same number of steps; heads choose among several learning
rates on held-out images, and with --lr every mode chooses among those. Several limits, the numbers of training images,
give a row of each mode for each. Reported is the mean over the runs with a 95 % interval (Student's t). Cells that FILE
already has are not run again, and other rows of it stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from iwm_fast.benchmarks.sweep import interval, public, run_iwm, run_jobs
from iwm_fast.engine.checkpoint.load import find_checkpoint
from iwm_fast.engine.run_directory import run_config
from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.eval.measurements import weights_of
from iwm_fast.measure.continued import earlier, files_digest, require_data, require_different
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_json

SCHEMA = "iwm-fast-finetune-table/1"
ARMS: dict[str, list[str]] = {
    "linear head": ["--mode", "linear"],
    "attentive head": ["--mode", "attentive"],
    "random predictor": ["--mode", "predictor", "--init", "random"],
    "pretrained predictor": ["--mode", "predictor", "--init", "pretrained"],
    "end to end": ["--mode", "end-to-end"],
}


def measure(run: Path, words: list[str]) -> dict[str, Any]:
    """Run one cell; return the body of the command's JSON."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        run_iwm("finetune", str(run), *words, "--json", str(answer))
        found: dict[str, Any] = json.loads(answer.read_text())
    return {key: value for key, value in found.items() if key not in ("schema", "environment")}


def weights_and_seed(run: Path) -> tuple[str, int]:
    """Return a digest of a run's newest checkpoint, and its training's seed, which its cells have too."""
    found = find_checkpoint(run)
    return weights_of(found), run_config(run / "config.yaml").train.seed


def require_weights(file: Path, arms: list[dict[str, Any]], chosen: dict[str, tuple[str, int]]) -> None:
    """Raise UserError where a file's cells are of another training under a run's name. Earlier versions did not record
    it.
    """
    for done in (done for arm in arms for done in arm["runs"] if done["run"] in chosen):
        if done.get("weights", chosen[done["run"]][0]) != chosen[done["run"]][0]:
            raise UserError(f"{file}: measured another training's {done['run']}, or an earlier step; give another file")


def empty_rows(limits: list[int] | None, shared: list[str]) -> list[dict[str, Any]]:
    """Return a row without runs for each mode, and of each for every limit; its ``images`` are that limit."""
    found = []
    for images in [None] if limits is None else limits:
        limit = [] if images is None else ["--limit", str(images)]
        for name, words in ARMS.items():
            found.append({"name": name, "images": images, "options": [*words, *shared, *limit], "runs": []})
    return found


def table(arms: list[dict[str, Any]]) -> str:
    """Return Markdown, one row per mode and limit."""
    lines = ["| | trained parameters | top-1, mean ± 95 % interval | by seed |", "|---|---|---|---|"]
    for arm in arms:
        if not arm["runs"]:
            continue
        values = [run["top1"] for run in arm["runs"]]
        found = interval(values)
        width = "" if found["half_width"] is None else f" ± {100 * found['half_width']:.1f}"
        shown = ", ".join(f"{value:.1%}" for value in values)
        parameters = f"{arm['runs'][0]['trained_parameters']:,}"
        images = "" if arm["images"] is None else f", {arm['images']:,} images"
        lines.append(f"| {arm['name']}{images} | {parameters} | {found['mean']:.1%}{width} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--limit", type=int, nargs="+", help="use this many training images; default: all")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--epochs", type=float, default=2.0)
    lengths.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", help="rates that every mode tries, as in `iwm-fast finetune`; default: the mode's own")
    parser.add_argument("--jobs", type=int, default=1, help="parallel cells; give each OMP_NUM_THREADS threads")
    args = parser.parse_args()
    require_result(args.json)
    length = ["--epochs", str(args.epochs)] if args.steps is None else ["--steps", str(args.steps)]
    shared = [*length, "--batch", str(args.batch), *([] if args.lr is None else ["--lr", args.lr])]
    require_different("runs' names", [run.name for run in args.runs])
    chosen = {run.name: weights_and_seed(run) for run in args.runs}
    result: dict[str, Any] = {
        "schema": SCHEMA, "environment": environment(), "command": public(sys.argv[1:]),
        "data": files_digest(args.data),
    }  # fmt: skip
    asked = result["arms"] = empty_rows(args.limit, shared)
    if found := earlier(args.json, SCHEMA):
        require_data(args.json, found, result["data"])
        require_weights(args.json, found["arms"], chosen)
        before = {tuple(arm["options"]): {"images": None} | arm for arm in found["arms"]}
        for arm in asked:
            arm["runs"] = before.pop(tuple(arm["options"]), arm)["runs"]
        result["arms"] = [*asked, *(arm for arm in before.values() if arm["runs"])]
    lock = threading.Lock()

    def cell(arm: dict[str, Any], run: Path) -> None:
        weights, seed = chosen[run.name]
        words = [*arm["options"], "--data", str(args.data), "--seed", str(seed)]
        done = {"run": run.name, "weights": weights, **measure(run, words)}
        with lock:
            arm["runs"].append(done)
            arm["runs"].sort(key=lambda done: done["run"])
            write_json(args.json, result, indent=1)

    missing = [  # runs outermost: a stopped benchmark has every mode of the first runs
        (arm, run)
        for run in args.runs
        for arm in asked
        if arm["name"] in args.arms and all(done["run"] != run.name for done in arm["runs"])
    ]
    run_jobs(cell, missing, args.jobs)
    print(table(result["arms"]))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.finetune", main))
