"""Draw the curves of a file that benchmarks.sweep wrote.

    python -m benchmarks.plots.sweep benchmarks/results/FILE.json docs/PICTURE.png

Loss, RankMe and, where they were measured while training, MRR and k-NN over the steps; a colour an arm, a line a seed.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from iwm_fast.benchmarks.plots import result_and_picture, save
from iwm_fast.programs import run_program

CURVES = {"loss": "loss", "rank_me": "RankMe of the target", "mrr": "MRR", "knn": "k-NN accuracy"}


def main() -> None:
    """Command line."""
    document, picture = result_and_picture(__doc__)
    arms = document["arms"]
    shown = [key for key in CURVES if any(key in r for arm in arms for run in arm["runs"] for r in run["curve"])]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), layout="constrained")
    for axis, key in zip(axes, shown, strict=True):
        for number, arm in enumerate(arms):
            for seed, run in enumerate(arm["runs"]):
                points = [(r["step"], r[key]) for r in run["curve"] if r.get(key) is not None]
                label = arm["name"] if seed == 0 and len(arms) > 1 else None
                axis.plot(*zip(*points, strict=True), color=f"C{number}", lw=1, alpha=0.8, label=label)
        axis.set_title(CURVES[key], fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(arms) > 1:
        axes[0].legend(fontsize=8)
    save(figure, picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.sweep", main))
