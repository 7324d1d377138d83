"""Draw the curves by which a healthy training is told from a collapsed one, of a file that benchmarks.sweep wrote.

    python -m benchmarks.plots.health benchmarks/results/health_cpu.json docs/health.png

Loss, RankMe of the target with the level of the warning, gradient norm, MRR and k-NN with their chance, and the share
of the mean in the energy of the target's tokens; a colour per variant. It also prints a table of a few steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from iwm_fast.benchmarks.plots import result_and_picture, save
from iwm_fast.programs import run_program

__all__ = ["draw", "table"]

PANELS = {
    "loss": "loss",
    "rank_me": "RankMe of the target",
    "grad_norm": "gradient norm",
    "mrr": "MRR",
    "knn": "k-NN accuracy",
    "energy_mean": "share of the mean in the tokens' energy",
}
LOGARITHMIC = ("loss", "grad_norm")
STEPS = (1, 10, 50, 100, 200, 300)


def curves(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of each variant's first seed."""
    return {arm["name"]: arm["runs"][0]["curve"] for arm in document["arms"]}


def table(document: dict[str, Any]) -> str:
    """Markdown: the panels' numbers at a few steps; – where a step was not measured."""
    lines = ["| run | step | " + " | ".join(PANELS.values()) + " |", "|---" * (len(PANELS) + 2) + "|"]
    for name, records in curves(document).items():
        for record in records:
            if record["step"] in STEPS:
                cells = ["–" if record.get(key) is None else f"{record[key]:.3g}" for key in PANELS]
                lines.append(f"| {name} | {record['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(document: dict[str, Any], picture: Path, floor: float) -> None:
    """A panel per measure; `floor`: RankMe below which the log warns."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    levels = {"rank_me": (floor, "warning")}
    for name, records in curves(document).items():
        for axis, key in zip(axes.flat, PANELS, strict=False):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            marker = "o" if key in ("mrr", "knn") else None
            axis.plot(*zip(*points, strict=True), lw=1.4, marker=marker, ms=4, label=name)
            chance = next((r[f"{key}_chance"] for r in records if f"{key}_chance" in r), None)
            if chance is not None:
                levels[key] = (chance, "chance")
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=False):
        if key in levels:
            level, word = levels[key]
            axis.axhline(level, color="black", lw=1, ls="--", label=word)
        if key in LOGARITHMIC:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[1].get_legend_handles_labels()
    labels[-1] = "level of the warning (RankMe), chance (MRR, k-NN)"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save(figure, picture)
    plt.close(figure)


def main() -> None:
    """Command line."""
    from iwm_fast.config.load import find_config, load_config

    document, picture = result_and_picture(__doc__)
    config = load_config(find_config(document["config"]), document["common"])
    print(table(document))
    draw(document, picture, config.log.rank_me_floor * config.model.encoder_shape.width)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.health", main))
