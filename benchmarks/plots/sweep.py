"""Plot the curves of a result of benchmarks.sweep.

    python -m benchmarks.plots.sweep benchmarks/results/FILE.json docs/PICTURE.png

Loss, RankMe and, if measured during training, MRR and k-NN over the steps: one colour per variant, one line per seed.
The dashed line is chance or the untrained network, the mean over all runs.
"""

from __future__ import annotations

import sys
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from iwm_fast.benchmarks.plots import result_and_picture, save
from iwm_fast.programs import run_program

# Curve: its title, and the control that is drawn as a dashed line, with its name.
CURVES = {
    "loss": ("loss", None),
    "rank_me": ("RankMe of the target", None),
    "mrr": ("MRR", ("mrr_chance", "chance")),
    "knn": ("k-NN accuracy", ("knn_untrained", "untrained, whole test set")),
}


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
        title, control = CURVES[key]
        if control is not None:
            name, said = control
            values = [r["evaluation"][name] for arm in arms for r in arm["runs"] if name in r["evaluation"]]
            if values:
                axis.axhline(mean(values), color="gray", ls="--", lw=1, label=said)
                axis.legend(fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(arms) > 1:
        axes[0].legend(fontsize=8)
    save(figure, picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.sweep", main))
