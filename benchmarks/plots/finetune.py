"""Plot a result of benchmarks.finetune with several limits: accuracy over training images, one line per mode.

    python -m benchmarks.plots.finetune benchmarks/results/FILE.json docs/PICTURE.png

Points are means over the runs, bars their 95 % intervals (Student's t).
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from iwm_fast.benchmarks.plots import result_and_picture, save
from iwm_fast.benchmarks.sweep import interval
from iwm_fast.programs import run_program


def main() -> None:
    """Command line."""
    document, picture = result_and_picture(__doc__)
    measured = [arm for arm in document["arms"] if arm["runs"] and arm.get("images") is not None]
    names = list(dict.fromkeys(arm["name"] for arm in measured))
    if not measured:
        sys.exit("no row has a number of images; measure with --limit N N ...")
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for name in names:
        points = [
            (arm["images"], interval([100 * run["top1"] for run in arm["runs"]]))
            for arm in measured
            if arm["name"] == name
        ]
        images, found = zip(*points, strict=True)
        widths = [value["half_width"] or 0.0 for value in found]
        axis.errorbar(images, [value["mean"] for value in found], widths, marker="o", ms=4, capsize=3, lw=1, label=name)
    axis.set_xscale("log")
    ticks = sorted({arm["images"] for arm in measured})
    axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axis.minorticks_off()
    axis.set_xlabel("training images")
    axis.set_ylabel("top-1 [%]")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.finetune", main))
