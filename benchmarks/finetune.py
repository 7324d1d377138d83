r"""Compare what can be trained on a frozen run: a head, a new predictor, or its own predictor, at one training budget.

    python -m benchmarks.finetune RUN... --data DIR --json FILE [--limit N] [--epochs E] [--batch B]

Each RUN is one seed of the same training. Each cell of the table is one `iwm-fast finetune` command. All modes train on
the same images for the same number of steps; heads choose among several learning rates. Reported is the mean over the
runs with a 95 % interval (Student's t). Cells that FILE already has are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from iwm_fast.benchmarks.sweep import interval, public
from iwm_fast.environment import environment
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
        command = [sys.executable, "-m", "iwm_fast", "finetune", str(run), *words, "--json", str(answer)]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        found: dict[str, Any] = json.loads(answer.read_text())
    return {key: value for key, value in found.items() if key not in ("schema", "environment")}


def table(arms: list[dict[str, Any]]) -> str:
    """Return Markdown, one row per mode."""
    lines = ["| | trained parameters | top-1, mean ± 95 % interval | by seed |", "|---|---|---|---|"]
    for arm in arms:
        if not arm["runs"]:
            continue
        values = [run["top1"] for run in arm["runs"]]
        found = interval(values)
        width = "" if found["half_width"] is None else f" ± {100 * found['half_width']:.1f}"
        shown = ", ".join(f"{value:.1%}" for value in values)
        parameters = f"{arm['runs'][0]['trained_parameters']:,}"
        lines.append(f"| {arm['name']} | {parameters} | {found['mean']:.1%}{width} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--limit", type=int, help="use this many training images; default: all")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    require_result(args.json)
    shared = ["--epochs", str(args.epochs), "--batch", str(args.batch)]
    shared += [] if args.limit is None else ["--limit", str(args.limit)]
    result: dict[str, Any] = {"schema": SCHEMA, "environment": environment(), "command": public(sys.argv[1:])}
    result["arms"] = [{"name": name, "options": [*words, *shared], "runs": []} for name, words in ARMS.items()]
    if args.json.exists():
        before = {arm["name"]: arm for arm in json.loads(args.json.read_text())["arms"]}
        for arm in result["arms"]:
            if before.get(arm["name"], {}).get("options") == arm["options"]:
                arm["runs"] = before[arm["name"]]["runs"]
    for place, run in enumerate(args.runs):  # runs outermost: a stopped benchmark has every mode of the first runs
        for arm in result["arms"]:
            if arm["name"] not in args.arms or any(done["run"] == run.name for done in arm["runs"]):
                continue
            words = [*arm["options"], "--data", str(args.data), "--seed", str(place)]
            arm["runs"].append({"run": run.name, **measure(run, words)})
            arm["runs"].sort(key=lambda done: done["run"])
            write_json(args.json, result, indent=1)
    print(table(result["arms"]))


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.finetune", main))
