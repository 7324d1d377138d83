"""Plot the roll-outs in results of benchmarks.sweep on triplets.

    python -m benchmarks.plots.rollouts docs/PICTURE.png NAME=benchmarks/results/FILE.json [NAME=FILE ...]

One panel per file: the error over the horizon given the true actions, given another roll-out's actions, and of a copy
of the first frame; one line per seed, with its 95 % bootstrap interval over roll-outs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from iwm_fast.benchmarks.plots import save
from iwm_fast.outputs import require_file
from iwm_fast.programs import run_program

LINES = {"model": "world model", "shuffled": "shuffled actions", "copy": "copy of the first frame"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", nargs="+", metavar="NAME=FILE")
    args = parser.parse_args()
    require_file(args.picture, "picture")
    named = [text.split("=", 1) for text in args.results]
    figure, axes = plt.subplots(1, len(named), figsize=(4.6 * len(named), 3.4), layout="constrained", squeeze=False)
    for axis, (name, file) in zip(axes[0], named, strict=True):
        runs = [run for arm in json.loads(Path(file).read_text())["arms"] for run in arm["runs"]]
        for number, (key, label) in enumerate(LINES.items()):
            for place, run in enumerate(runs):
                rolled = run["evaluation"]["rollout"]
                low, high = zip(*rolled[f"{key}_interval"], strict=True)
                axis.fill_between(rolled["horizons"], low, high, color=f"C{number}", alpha=0.15, lw=0)
                shown = label if place == 0 else None
                axis.plot(rolled["horizons"], rolled[key], color=f"C{number}", lw=1.2, marker="o", ms=3, label=shown)
        axis.set_title(f"{name}, {len(runs)} seed{'s' if len(runs) > 1 else ''}", fontsize=10)
        axis.set_xlabel("horizon, actions")
        axis.set_ylabel("mean squared error")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    save(figure, args.picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.rollouts", main))
